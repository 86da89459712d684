package main

type screen struct{}
