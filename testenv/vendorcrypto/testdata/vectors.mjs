// Writes vectors.json beside itself with Node's own crypto:
//   node testenv/vendorcrypto/testdata/vectors.mjs
// IVs and phrases are fixed, so the file does not change from run to run. "open" says what
// a receiver must make of it: "ok", "error", or "garbage" (a256ctr has no integrity check).
import crypto from "node:crypto";
import fs from "node:fs";

const plain = JSON.stringify({ _id: "o-1", version: 2, items: [{ name: "Crème brûlée", quantity: 2 }], comment: "ohne Nüsse 🥜" });
const bytes = (n, from) => Buffer.from(Array.from({ length: n }, (_, i) => (from + i * 7) & 255));

function vector(name, profile, phrase, over = {}) {
  const p = { kdf: "pbkdf2", hash: "sha256", iterations: 600000, salt: "", info: "kb-" + profile.profile, iv_encoding: "base64", message_encoding: "base64", ...profile };
  const key = p.kdf === "hkdf"
    ? Buffer.from(crypto.hkdfSync(p.hash, phrase, p.salt, p.info, 32))
    : crypto.pbkdf2Sync(phrase, p.salt, p.iterations, 32, p.hash);
  const iv = bytes(p.profile === "a256ctr" ? 16 : 12, name.length);
  const c = crypto.createCipheriv(p.profile === "a256ctr" ? "aes-256-ctr" : "aes-256-gcm", key, iv);
  const parts = [c.update(plain, "utf8"), c.final()];
  if (p.profile === "a256gcm") parts.push(c.getAuthTag());
  if (profile.info === undefined) delete p.info; // the reader's default must be the same
  const v = { name, profile: p, passphrase: phrase, iv: iv.toString(p.iv_encoding), message: Buffer.concat(parts).toString(p.message_encoding), plain, open: "ok" };
  return { ...v, ...(typeof over === "function" ? over(v) : over) };
}

const fast = { iterations: 1000 };
const flip = (m) => { const b = Buffer.from(m, "base64"); b[3] ^= 1; return b.toString("base64"); };
const vectors = [
  vector("gcm, all defaults", { profile: "a256gcm" }, "correct horse battery staple"),
  vector("ctr, all defaults", { profile: "a256ctr" }, "correct horse battery staple"),
  vector("gcm, sha512 and salt", { profile: "a256gcm", hash: "sha512", salt: "stør-17", ...fast }, "pâté"),
  vector("ctr, sha1 and salt, hex", { profile: "a256ctr", hash: "sha1", salt: "s", iv_encoding: "hex", message_encoding: "hex", ...fast }, "pâté"),
  vector("gcm, base64url", { profile: "a256gcm", iv_encoding: "base64url", message_encoding: "base64url", ...fast }, "p"),
  vector("ctr, iv in hex, message in base64", { profile: "a256ctr", iv_encoding: "hex", ...fast }, "p"),
  vector("gcm, hkdf", { profile: "a256gcm", kdf: "hkdf", salt: "salt", info: "label" }, crypto.createHash("sha256").update("seed").digest("hex")),
  vector("ctr, hkdf, sha512, no salt", { profile: "a256ctr", kdf: "hkdf", hash: "sha512" }, "0123456789abcdef0123456789abcdef"),
  vector("gcm, trailing newline", { profile: "a256gcm", ...fast }, "p", (v) => ({ message: v.message + "\n" })),
  vector("gcm, another phrase", { profile: "a256gcm", ...fast }, "p", { passphrase: "q", open: "error" }),
  vector("ctr, another phrase", { profile: "a256ctr", ...fast }, "p", { passphrase: "q", open: "garbage" }),
  vector("gcm, a bit flipped", { profile: "a256gcm", ...fast }, "p", (v) => ({ message: flip(v.message), open: "error" })),
  vector("gcm, cut short", { profile: "a256gcm", ...fast }, "p", (v) => ({ message: v.message.slice(0, 8), open: "error" })),
  vector("gcm, iv of ctr's length", { profile: "a256gcm", ...fast }, "p", { iv: bytes(16, 1).toString("base64"), open: "error" }),
  vector("ctr, iv of gcm's length", { profile: "a256ctr", ...fast }, "p", { iv: bytes(12, 1).toString("base64"), open: "error" }),
  vector("gcm, iv is not base64", { profile: "a256gcm", ...fast }, "p", { iv: "not base64!", open: "error" }),
  vector("ctr, message is not base64", { profile: "a256ctr", ...fast }, "p", { message: "{}", open: "error" }),
  vector("ctr, line break inside the message", { profile: "a256ctr", ...fast }, "p", (v) => ({ message: v.message.slice(0, 8) + "\n" + v.message.slice(8), open: "error" })),
  vector("gcm, message in hex where base64 is agreed", { profile: "a256gcm", ...fast }, "p", (v) => ({ message: Buffer.from(v.message, "base64").toString("hex"), open: "error" })),
];
fs.writeFileSync(new URL("vectors.json", import.meta.url), JSON.stringify(vectors, null, 1) + "\n");
