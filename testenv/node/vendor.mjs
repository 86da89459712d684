// The protocol by Node's own crypto, for the two scripts beside this file. It shares no
// code with the Go packages, so it can disagree with them.
import crypto from "node:crypto";
import fs from "node:fs";
import https from "node:https";

// demo reads the file that `go run ./testenv/demo` keeps while it runs.
export function demo(path, site) {
  const d = JSON.parse(fs.readFileSync(path, "utf8"));
  if (!d.sites[site]) throw new Error(`${path} has no site ${site}; it has ${Object.keys(d.sites).join(", ")}`);
  return { ...d, site, ...d.sites[site] };
}

// keys asks the Portal for the site's key block.
export function keys(d) {
  return new Promise((resolve, reject) => {
    const req = https.get(`${d.portal.url}/sites/${d.site}`, {
      ca: fs.readFileSync(d.portal.ca_file),
      headers: { authorization: `Bearer ${d.portal.token}` },
    }, (res) => {
      let body = "";
      res.on("data", (b) => (body += b));
      res.on("end", () => res.statusCode === 200
        ? resolve(JSON.parse(body).security.enterprise_kitchen)
        : reject(new Error(`Portal: ${res.statusCode} ${body}`)));
    });
    req.on("error", reject);
  });
}

// current is the key to seal with: the oldest one that is valid, which both ends have.
export function current(block) {
  const now = Date.now();
  const valid = block.keys.filter((k) => Date.parse(k.valid_after) <= now && now < Date.parse(k.valid_until));
  return valid.sort((a, b) => Date.parse(a.valid_after) - Date.parse(b.valid_after))[0];
}

const derived = new Map();
function derive(d, key) {
  if (!derived.has(key.fingerprint)) {
    derived.set(key.fingerprint, crypto.pbkdf2Sync(key.value, "", d.iterations, 32, "sha256"));
  }
  return derived.get(key.fingerprint);
}

export function seal(d, key, text) {
  if (d.profile === "a256ctr") {
    const iv = crypto.randomBytes(16);
    const c = crypto.createCipheriv("aes-256-ctr", derive(d, key), iv);
    return { iv: iv.toString("base64"), fingerprint: key.fingerprint, message: Buffer.concat([c.update(text), c.final()]).toString("base64") };
  }
  const iv = crypto.randomBytes(12);
  const c = crypto.createCipheriv("aes-256-gcm", derive(d, key), iv);
  const body = Buffer.concat([c.update(text), c.final()]);
  return { iv: iv.toString("base64"), fingerprint: key.fingerprint, message: Buffer.concat([body, c.getAuthTag()]).toString("base64") };
}

export function open(d, block, triple) {
  const key = block.keys.find((k) => k.fingerprint === triple.fingerprint);
  if (!key) throw new Error(`unknown fingerprint ${triple.fingerprint}`);
  const iv = Buffer.from(triple.iv, "base64");
  const raw = Buffer.from(triple.message, "base64");
  if (d.profile === "a256ctr") {
    const c = crypto.createDecipheriv("aes-256-ctr", derive(d, key), iv);
    return Buffer.concat([c.update(raw), c.final()]).toString("utf8");
  }
  const c = crypto.createDecipheriv("aes-256-gcm", derive(d, key), iv);
  c.setAuthTag(raw.subarray(-16));
  return Buffer.concat([c.update(raw.subarray(0, -16)), c.final()]).toString("utf8");
}
