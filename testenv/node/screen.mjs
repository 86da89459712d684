// A Kitchen screen by the npm package ws and Node's crypto, against a running demo.
//   npm install --no-save ws
//   node testenv/node/screen.mjs DEMO.json SITE [FRAMES]
// Connects with the seed's headers, decrypts FRAMES frames (default 5), prints them and
// ends with 0. With --without NAME it leaves one header out and expects to be refused.
import crypto from "node:crypto";
import WebSocket from "ws";
import { current, demo, keys, open } from "./vendor.mjs";

const args = process.argv.slice(2);
const at = args.indexOf("--without");
const without = at >= 0 ? args.splice(at, 2)[1] : "";
const [path, site, frames = "5"] = args;
if (!site) {
  console.error("usage: node testenv/node/screen.mjs DEMO.json SITE [FRAMES] [--without HEADER]");
  process.exit(2);
}
const d = demo(path, site);
let block = await keys(d);
const headers = { Origin: "ionic" };
if (d.screen_token) headers.Authorization = `Bearer ${d.screen_token}`;
if (block.encryption) {
  headers["sec-fingerprint"] = current(block).fingerprint;
  headers["sec-iv"] = crypto.randomBytes(d.profile === "a256ctr" ? 16 : 12).toString("base64");
}
if (without) delete headers[Object.keys(headers).find((h) => h.toLowerCase() === without.toLowerCase())];

const ws = new WebSocket(d.screen, { headers, perMessageDeflate: true });
let seen = 0, alive = 0;
const timer = setTimeout(() => { console.error(`only ${seen} frames in 30 s`); process.exit(1); }, 30_000);
ws.on("unexpected-response", (_, res) => {
  let body = "";
  res.on("data", (b) => (body += b));
  res.on("end", () => {
    clearTimeout(timer);
    console.log(res.statusCode, body.trim());
    process.exit(without ? 0 : 1);
  });
});
ws.on("open", () => {
  if (without) { console.error(`accepted without ${without}`); process.exit(1); }
  console.log(`connected to ${site}; extensions: ${ws.extensions || "none"}`);
});
ws.on("message", async (data) => {
  const text = data.toString();
  if (text === "isAlive?") { alive++; return; }
  const frame = JSON.parse(text);
  let plain = text;
  if (frame.fingerprint) {
    if (!block.keys.some((k) => k.fingerprint === frame.fingerprint)) block = await keys(d);
    plain = open(d, block, frame);
    console.log(`fingerprint ${frame.fingerprint.slice(0, 8)}…`, JSON.parse(plain).order_number ?? plain.slice(0, 60));
  } else {
    console.log("plain", JSON.parse(plain).order_number ?? plain.slice(0, 60));
  }
  if (++seen >= Number(frames) && alive > 0) {
    clearTimeout(timer);
    console.log(`${seen} frames decrypted, isAlive? ${alive} times`);
    ws.close(1000);
  }
});
ws.on("close", () => process.exit(0));
ws.on("error", (err) => { console.error(err.message); process.exit(1); });
