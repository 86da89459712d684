// Seals one order with Node's crypto and posts it to a running demo.
//   node testenv/node/order.mjs DEMO.json SITE [ORDER.json]
// Prints the status and the answer; exit status 0 for a 2xx.
import crypto from "node:crypto";
import fs from "node:fs";
import { current, demo, keys, seal } from "./vendor.mjs";

const [path, site, file] = process.argv.slice(2);
if (!site) {
  console.error("usage: node testenv/node/order.mjs DEMO.json SITE [ORDER.json]");
  process.exit(2);
}
const d = demo(path, site);
const text = file ? fs.readFileSync(file, "utf8") : JSON.stringify({
  _id: crypto.randomUUID(), order_number: "N-17", destination: { id: "1", name: "Expo", consumption_type: "dine-in" },
  items: [{ name: "Crème brûlée", quantity: 1 }], comment: "sealed by Node",
});
const block = await keys(d);
const headers = { "content-type": "application/json", accept: "application/json" };
if (d.pos_token) headers.authorization = `Bearer ${d.pos_token}`;
let body = text;
if (block.encryption) {
  const t = seal(d, current(block), text);
  headers["sec-iv"] = t.iv;
  headers["sec-fingerprint"] = t.fingerprint;
  body = t.message;
}
const res = await fetch(`${d.edge}/order`, { method: "POST", headers, body });
console.log(res.status, await res.text());
process.exit(res.ok ? 0 : 1);
