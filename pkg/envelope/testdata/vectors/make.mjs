// Makes the test vectors of this folder, from docs/spec/envelope.md and node's own crypto, without the Go package they test.
//
//	node make.mjs           writes the files, and removes those it no longer makes
//	node make.mjs --check   writes nothing; fails when a file differs, is missing or is one too many
//
// Needs Node.js 20 or later and nothing else. All inputs are fixed, so a second run gives the same bytes.

import { createCipheriv, createHash, createHmac, hkdfSync, pbkdf2Sync } from 'node:crypto'
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const folder = dirname(fileURLToPath(import.meta.url))
const files = new Map()

function vector (name, kind, comment, body) {
  if (files.has(name)) throw new Error(`two vectors are called ${name}`)
  files.set(name, JSON.stringify({ comment, kind, ...body }, null, 2) + '\n')
}

// Fixed bytes that look random.
const bytes = (label, n) => createHash('sha512').update(label).digest().subarray(0, n)

// Ciphers, keys and texts -------------------------------------------------------------------------------------------------------

function derive (settings, passphrase) {
  const { profile, kdf = 'pbkdf2', hash = 'sha256', iterations = 600000, salt = '' } = settings
  if (kdf === 'hkdf') return Buffer.from(hkdfSync(hash, Buffer.from(passphrase), Buffer.from(salt), 'kb-' + profile, 32))
  return pbkdf2Sync(Buffer.from(passphrase), Buffer.from(salt), iterations, 32, hash)
}

function encrypt (profile, key, iv, plaintext) {
  const cipher = createCipheriv(profile === 'a256gcm' ? 'aes-256-gcm' : 'aes-256-ctr', key, iv)
  const parts = [cipher.update(plaintext), cipher.final()]
  if (profile === 'a256gcm') parts.push(cipher.getAuthTag())
  return Buffer.concat(parts)
}

const write = (encoding, b) => b.toString(encoding ?? 'base64')
const ivSize = profile => profile === 'a256gcm' ? 12 : 16
const tripleJSON = (iv, fingerprint, message) => JSON.stringify({ iv, fingerprint, message })

const phrase = 'correct horse battery staple'
const order = '{"_id":"65f1c0ffee","order_number":"A-113","items":[{"name":"Burger","qty":2}],"comment":"no onions"}'

// 100 bytes, so that the base64 of the ciphertext ends in padding under both profiles.
const hundred = order.replace('no onions', 'no onion')

// One sealed order and all that is needed to follow how it was made.
function sealed (name, settings, { passphrase = phrase, fingerprint = 'd41d8cd98f00b204e9800998ecf8427e', plaintext = order } = {}) {
  const key = derive(settings, passphrase)
  const iv = bytes('iv of ' + name, ivSize(settings.profile))
  const ciphertext = encrypt(settings.profile, key, iv, Buffer.from(plaintext))
  return {
    settings,
    passphrase,
    fingerprint,
    key_hex: key.toString('hex'),
    iv_hex: iv.toString('hex'),
    plaintext,
    iv: write(settings.iv_encoding, iv),
    message: write(settings.message_encoding, ciphertext),
    rawIV: iv,
    ciphertext
  }
}

// What a vector of kind "triple" holds. change replaces what the reader is given.
function triple (s, expect, change = {}) {
  const { rawIV, ciphertext, iv, message, ...rest } = s
  const given = { iv, message, named: rest.fingerprint, ...change }
  const body = { ...rest, triple: change.json ?? tripleJSON(given.iv, given.named, given.message), expect }
  if (change.passphrase !== undefined) body.passphrase = change.passphrase
  if (change.plaintext !== undefined) body.plaintext = change.plaintext
  if (expect !== 'ok') { delete body.key_hex; delete body.iv_hex; delete body.plaintext }
  if (expect === 'ok') body.canonical = change.canonical ?? Object.keys(change).length === 0
  return body
}

const gcm = { profile: 'a256gcm', iterations: 1000 }
const ctr = { profile: 'a256ctr', iterations: 1000 }

for (const base of [gcm, ctr]) {
  const p = base.profile
  const made = (name, comment, settings, options) => vector(`${p}-${name}`, 'triple', comment, triple(sealed(`${p}-${name}`, settings, options), 'ok'))
  made('plain', 'Opens. Base64, SHA-256, no salt: all defaults except for the iterations.', base)
  made('sha1', 'Opens. PBKDF2 with SHA-1.', { ...base, hash: 'sha1' })
  made('sha512', 'Opens. PBKDF2 with SHA-512.', { ...base, hash: 'sha512' })
  made('one-iteration', 'Opens. PBKDF2 with a single iteration.', { ...base, iterations: 1 })
  made('salt', 'Opens. The salt is the UTF-8 bytes of the setting.', { ...base, salt: 'Küche Nº 7' })
  made('unicode-phrase', 'Opens. The pass phrase is used as its UTF-8 bytes, not normalised: e and a combining acute accent stay two characters.', base,
    { passphrase: 'cafe\u0301 \u{1F35F} 寿司', plaintext: '{"name":"Cr\u00e8me br\u00fbl\u00e9e \u{1F36E}"}' })
  for (const iv of ['base64', 'base64url', 'hex']) {
    for (const message of ['base64', 'base64url', 'hex']) {
      made(`iv-${iv}-message-${message}`, `Opens. IV as ${iv}, message as ${message}.`, { ...base, iv_encoding: iv, message_encoding: message })
    }
  }
  made('hkdf', `Opens. HKDF-SHA-256, empty salt, info "kb-${p}".`, { profile: p, kdf: 'hkdf' }, { passphrase: '0f1e2d3c4b5a69788796a5b4c3d2e1f0' })
  made('hkdf-sha512-salt', `Opens. HKDF-SHA-512 with a salt, info "kb-${p}".`, { profile: p, kdf: 'hkdf', hash: 'sha512', salt: 'store-0113' },
    { passphrase: 'exactly 16 bytes' })
  made('tiny', 'Opens. The shortest JSON there is.', base, { plaintext: '0' })
  made('block-boundary', 'Opens. The plaintext fills whole cipher blocks.', base, { plaintext: JSON.stringify('x'.repeat(62)) })
  made('long', 'Opens. 3 KiB, longer than any one chunk of an implementation.', base, { plaintext: JSON.stringify('no onions. '.repeat(280)) })

  const s = sealed(`${p}-failures`, base)
  const fails = (name, expect, comment, change) => vector(`${p}-${name}`, 'triple', comment, triple(s, expect, change))
  const reads = (name, comment, settings, change) => {
    const s = sealed(`${p}-${name}`, settings)
    vector(`${p}-${name}`, 'triple', comment, triple(s, 'ok', change(s)))
  }
  reads('hex-upper-case', 'Opens. Hex is read in either case.', { ...base, iv_encoding: 'hex', message_encoding: 'hex' },
    s => ({ iv: s.iv.toUpperCase(), message: s.message.toUpperCase() }))
  reads('base64url-padded', 'Opens. base64url is read with or without padding.', { ...base, iv_encoding: 'base64url', message_encoding: 'base64url' },
    s => ({ iv: s.rawIV.toString('base64').replaceAll('+', '-').replaceAll('/', '_'), message: s.ciphertext.toString('base64').replaceAll('+', '-').replaceAll('/', '_') }))
  reads('trailing-white-space', 'Opens. White space behind the message is tolerated, as a POS that ends its body with a line break sends it.', base,
    s => ({ message: s.message + ' \t\r\n' }))
  reads('escaped-json', 'Opens. A JSON writer may escape any character: here the solidus and the plus sign of base64.', base,
    s => ({ json: tripleJSON(s.iv, s.fingerprint, s.message).replaceAll('/', '\\/').replaceAll('+', '\\u002b') }))

  fails('wrong-passphrase', 'decrypt', p === 'a256gcm' ? 'Refused: the authentication tag does not verify.' : 'Refused: the result is not JSON, which is all that CTR lets a reader notice.', { passphrase: 'incorrect horse' })
  fails('unknown-fingerprint', 'unknown-fingerprint', 'Refused: no key has this fingerprint, though the key that made the message is there.', { named: '00000000000000000000000000000000' })
  fails('binding-fingerprint', 'unknown-fingerprint', 'Refused: fingerprints that begin with kb: name binding keys, never a key of the Portal.', { named: 'kb:b1' })
  const flipped = Buffer.from(s.ciphertext); flipped[0] ^= 1
  fails('flipped-first-bit', 'decrypt', 'Refused: one bit of the first byte is flipped.', { message: flipped.toString('base64') })
  const half = s.ciphertext.subarray(0, s.ciphertext.length >> 1)
  fails('truncated', 'decrypt', 'Refused: the second half of the message is missing.', { message: half.toString('base64') })
  fails('empty-message', 'decrypt', 'Refused: nothing is no message.', { message: '' })
  fails('iv-of-another-message', 'decrypt', 'Refused: the IV belongs to another message.', { iv: bytes('another iv', ivSize(p)).toString('base64') })
  fails('iv-too-short', 'iv', 'Refused: the IV is one byte short.', { iv: s.rawIV.subarray(1).toString('base64') })
  fails('iv-too-long', 'iv', 'Refused: the IV is one byte long.', { iv: Buffer.concat([s.rawIV, Buffer.of(0)]).toString('base64') })
  fails('iv-of-the-other-profile', 'iv', 'Refused: the IV has the length of the other profile.', { iv: bytes('other profile', 28 - ivSize(p)).toString('base64') })
  fails('iv-in-hex', 'iv', 'Refused: the IV is hex where the site has base64.', { iv: s.rawIV.toString('hex') })
  fails('iv-with-line-break', 'iv', 'Refused: a line break inside the IV.', { iv: s.iv.slice(0, 4) + '\n' + s.iv.slice(4) })
  fails('iv-with-trailing-line-break', 'iv', 'Refused: a line break behind the IV; only the message is forgiven that.', { iv: s.iv + '\n' })
  const url = sealed(`${p}-base64url-line-breaks`, { ...base, iv_encoding: 'base64url', message_encoding: 'base64url' }, { plaintext: hundred })
  const broken = t => t.slice(0, 8) + '\n' + t.slice(8)
  vector(`${p}-base64url-iv-line-break`, 'triple', 'Refused: a line break inside an IV that has no padding to betray it.', triple(url, 'iv', { iv: broken(url.iv) }))
  vector(`${p}-base64url-message-line-break`, 'triple', 'Refused: a line break inside a message that has no padding to betray it.', triple(url, 'decrypt', { message: broken(url.message) }))
  fails('iv-absurd', 'iv', 'Refused: an IV of 3,000 characters.', { iv: 'A'.repeat(3000) })
  fails('message-not-base64', 'decrypt', 'Refused: the message has a character that is none of base64.', { message: '*' + s.message.slice(1) })
  const inURL = s.message.replaceAll('+', '-').replaceAll('/', '_')
  if (inURL === s.message) throw new Error('the message has no character that tells the alphabets apart')
  fails('message-base64url-alphabet', 'decrypt', 'Refused: the right message in the alphabet of base64url where the site has base64.', { message: inURL })
  fails('message-with-line-breaks', 'decrypt', 'Refused: the message is broken into lines, as by MIME.', { message: s.message.replace(/.{76}/g, '$&\n') + '\n' })
  fails('message-with-leading-space', 'decrypt', 'Refused: white space before the message.', { message: ' ' + s.message })
  const padded = sealed(`${p}-message-unpadded`, base, { plaintext: hundred })
  vector(`${p}-message-unpadded`, 'triple', 'Refused: the right message in base64 without its padding.', triple(padded, 'decrypt', { message: padded.message.replaceAll('=', '') }))
  fails('message-in-hex', 'decrypt', 'Refused: hex where the site has base64.', { message: s.ciphertext.toString('hex') })
}

{
  const t = sealed('a256gcm-trailing-bits', gcm, { plaintext: hundred })
  const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
  const spare = t.message.replace(/.(?==$)/, c => alphabet[alphabet.indexOf(c) ^ 1])
  vector('a256gcm-trailing-bits', 'triple', 'Refused before it is decrypted: the unused bits of the last base64 character are not zero, so the text is not the one of its bytes. A lax reader would open it.', triple(t, 'decrypt', { message: spare }))
  const s = sealed('a256gcm-failures-of-tag', gcm)
  const flipped = Buffer.from(s.ciphertext); flipped[flipped.length - 1] ^= 0x80
  vector('a256gcm-flipped-tag-bit', 'triple', 'Refused: one bit of the authentication tag is flipped.', triple(s, 'decrypt', { message: flipped.toString('base64') }))
  vector('a256gcm-shorter-than-tag', 'triple', 'Refused: 15 bytes are less than the authentication tag.', triple(s, 'decrypt', { message: s.ciphertext.subarray(0, 15).toString('base64') }))
  const e = sealed('a256gcm-empty-plaintext', gcm, { plaintext: '' })
  vector('a256gcm-empty-plaintext', 'triple', 'Opens to nothing: under a256gcm the authentication tag vouches for the message, so it need not be JSON.', triple(e, 'ok'))
  const n = sealed('a256gcm-not-json', gcm, { plaintext: 'not JSON' })
  vector('a256gcm-not-json', 'triple', 'Opens: under a256gcm the plaintext need not be JSON.', triple(n, 'ok'))
}
{
  const s = sealed('a256ctr-not-json', ctr, { plaintext: '{"qty":2' })
  vector('a256ctr-not-json', 'triple', 'Refused: the right key, and a plaintext that is not JSON. Under a256ctr a reader cannot tell this from a wrong key.', triple(s, 'decrypt'))
  const two = sealed('a256ctr-two-values', ctr, { plaintext: '{} {}' })
  vector('a256ctr-two-values', 'triple', 'Refused: two JSON values are not one.', triple(two, 'decrypt'))
  const q = sealed('a256ctr-flipped-quantity', ctr, { plaintext: '{"qty":2}' })
  const flipped = Buffer.from(q.ciphertext); flipped[7] ^= 1
  vector('a256ctr-flipped-quantity', 'triple', 'Opens to an altered order: CTR has no integrity check, and a flipped bit made quantity 2 a 3. Only the tag of the event notices.', triple(q, 'ok', { message: flipped.toString('base64'), plaintext: '{"qty":3}' }))
  const u = sealed('a256ctr-not-utf8', ctr, { plaintext: '{"name":"xx"}' })
  const bad = Buffer.from(u.ciphertext); bad[9] ^= 0x80
  vector('a256ctr-not-utf8', 'triple', 'Refused: a flipped bit left a byte that is not UTF-8, so the text is not JSON.', triple(u, 'decrypt', { message: bad.toString('base64') }))
  const w = { ...ctr }
  const iv = Buffer.alloc(16, 0xff)
  const key = derive(w, phrase)
  const text = JSON.stringify('the counter wraps around behind the first block')
  vector('a256ctr-counter-wraps', 'triple', 'Opens. The IV is the first counter block, a 128-bit big-endian number: it overflows from ff..ff to 00..00.', {
    settings: w, passphrase: phrase, fingerprint: 'fp', key_hex: key.toString('hex'), iv_hex: iv.toString('hex'), plaintext: text,
    triple: tripleJSON(iv.toString('base64'), 'fp', encrypt('a256ctr', key, iv, Buffer.from(text)).toString('base64')), expect: 'ok', canonical: true
  })
}
vector('default-iterations', 'triple', 'Opens. The default: PBKDF2 with SHA-256, 600,000 iterations and an empty salt.', triple(sealed('default-iterations', { profile: 'a256gcm' }), 'ok'))
vector('profile-not-chosen-by-message', 'triple', 'Refused: a message sealed under a256ctr does not open at a site of a256gcm; its IV has the wrong length.',
  { ...triple(sealed('profile-not-chosen-by-message', ctr), 'iv'), settings: gcm })

// Settings and keys that are refused ---------------------------------------------------------------------------------------------

const settings = (name, comment, settings, more = {}) => vector(`settings-${name}`, 'settings', comment, { settings, passphrase: phrase, fingerprint: 'fp', ...more, expect: 'settings' })
settings('no-profile', 'Refused: the profile is required.', {})
settings('unknown-profile', 'Refused: no such profile.', { profile: 'a128gcm' })
settings('upper-case-profile', 'Refused: names are exact.', { profile: 'A256GCM' })
settings('unknown-kdf', 'Refused: no such key derivation.', { profile: 'a256gcm', kdf: 'scrypt' })
settings('unknown-hash', 'Refused: no such hash.', { profile: 'a256gcm', hash: 'md5' })
settings('negative-iterations', 'Refused: iterations out of range.', { profile: 'a256gcm', iterations: -1 })
settings('absurd-iterations', 'Refused: iterations out of range.', { profile: 'a256gcm', iterations: 10000001 })
settings('hkdf-iterations', 'Refused: hkdf has no iterations.', { profile: 'a256gcm', kdf: 'hkdf', iterations: 1000 })
settings('unknown-iv-encoding', 'Refused: no such encoding.', { profile: 'a256gcm', iv_encoding: 'base32' })
settings('unknown-message-encoding', 'Refused: no such encoding.', { profile: 'a256gcm', message_encoding: 'utf8' })
settings('hkdf-short-phrase', 'Refused: hkdf is for random secrets; 15 bytes cannot hold 128 random bits as text.', { profile: 'a256gcm', kdf: 'hkdf' }, { passphrase: '15 bytes, short' })
settings('empty-phrase', 'Refused: a key needs a pass phrase.', { profile: 'a256gcm' }, { passphrase: '' })
settings('empty-fingerprint', 'Refused: a key needs a fingerprint.', { profile: 'a256gcm' }, { fingerprint: '' })
settings('long-fingerprint', 'Refused: a fingerprint has at most 128 bytes.', { profile: 'a256gcm' }, { fingerprint: 'f'.repeat(129) })
settings('binding-fingerprint', 'Refused: the prefix kb: is reserved for binding keys.', { profile: 'a256gcm' }, { fingerprint: 'kb:b1' })
settings('fingerprint-with-space', 'Refused: a fingerprint stands in an HTTP header; only visible ASCII does.', { profile: 'a256gcm' }, { fingerprint: 'a b' })
settings('fingerprint-with-line-break', 'Refused: a line break would end the HTTP header.', { profile: 'a256gcm' }, { fingerprint: 'a\r\nX: b' })
settings('fingerprint-not-ascii', 'Refused: a fingerprint stands in an HTTP header; only visible ASCII does.', { profile: 'a256gcm' }, { fingerprint: 'schlüssel' })

// Reading the JSON of a triple ----------------------------------------------------------------------------------------------------

const parsed = (name, comment, json, iv, fingerprint, message, more = {}) => vector(`parse-${name}`, 'parse', comment, { json, ...more, expect: 'ok', iv, fingerprint, message })
const refused = (name, comment, json, more = {}, expect = 'triple') => vector(`parse-${name}`, 'parse', comment,
  Buffer.isBuffer(json) ? { json_base64: json.toString('base64'), ...more, expect } : { json, ...more, expect })
const good = '{"iv":"AA==","fingerprint":"fp","message":"QUJD"}'

parsed('canonical', 'Read. Written again it is the same text.', good, 'AA==', 'fp', 'QUJD')
parsed('other-order', 'Read. The fields may come in any order.', '{"message":"QUJD","iv":"AA==","fingerprint":"fp"}', 'AA==', 'fp', 'QUJD')
parsed('white-space', 'Read. JSON white space is allowed wherever JSON allows it.', ' \t\r\n{ "iv" : "AA==" ,\n"fingerprint":\t"fp","message":"QUJD" } \n', 'AA==', 'fp', 'QUJD')
parsed('all-short-escapes', 'Read. Every short escape of JSON.', '{"iv":"AA==","fingerprint":"fp","message":"\\"\\\\\\/\\b\\f\\n\\r\\t"}', 'AA==', 'fp', '"\\/\b\f\n\r\t')
parsed('unicode-escapes', 'Read. Escapes of one, two and three UTF-8 bytes, digits in either case, and U+0000.', '{"iv":"\\u0041\\u0041==","fingerprint":"f\\u0070","message":"\\u002B\\u00e9\\u20AC\\u0000"}', 'AA==', 'fp', '+é€\u0000')
parsed('surrogate-pair', 'Read. A surrogate pair is one character.', '{"iv":"AA==","fingerprint":"fp","message":"\\ud83c\\uDF5F"}', 'AA==', 'fp', '\u{1F35F}')
parsed('raw-unicode', 'Read. UTF-8 may stand unescaped, DEL and U+2028 too.', '{"iv":"AA==","fingerprint":"fp","message":"é€\u{1F35F}\u007f\u2028\uffff"}', 'AA==', 'fp', 'é€\u{1F35F}\u007f\u2028\uffff')
parsed('escaped-field-name', 'Read. A field name may be escaped as any string.', '{"\\u0069v":"AA==","fingerprint":"fp","messag\\u0065":"QUJD"}', 'AA==', 'fp', 'QUJD')
parsed('empty-message', 'Read. An empty message is a text; it will not open.', '{"iv":"AA==","fingerprint":"fp","message":""}', 'AA==', 'fp', '')
parsed('at-limit', 'Read. Exactly as large as the limit.', good, 'AA==', 'fp', 'QUJD', { max: good.length })
refused('over-limit', 'Refused: one byte larger than the limit.', good, { max: good.length - 1 }, 'too-large')
refused('over-limit-by-white-space', 'Refused: white space counts.', good + ' ', { max: good.length }, 'too-large')
refused('empty', 'Refused: nothing.', '')
refused('only-white-space', 'Refused: nothing.', ' \n')
refused('array', 'Refused: not an object.', '["AA==","fp","QUJD"]')
refused('string', 'Refused: not an object.', '"QUJD"')
refused('null', 'Refused: not an object.', 'null')
refused('empty-object', 'Refused: all fields are missing.', '{}')
for (const f of ['iv', 'fingerprint', 'message']) {
  const o = JSON.parse(good)
  const without = { ...o }; delete without[f]
  refused(`missing-${f}`, `Refused: ${f} is missing.`, JSON.stringify(without))
  refused(`duplicate-${f}`, `Refused: ${f} is there twice, though with the same value.`, good.slice(0, -1) + `,"${f}":${JSON.stringify(o[f])}}`)
  for (const [what, value] of [['null', null], ['number', 7], ['boolean', true], ['object', {}], ['array', ['x']]]) {
    refused(`${f}-is-${what}`, `Refused: ${f} is not a string.`, JSON.stringify({ ...o, [f]: value }))
  }
}
refused('empty-iv', 'Refused: the IV is empty.', '{"iv":"","fingerprint":"fp","message":"QUJD"}')
refused('empty-fingerprint', 'Refused: the fingerprint is empty.', '{"iv":"AA==","fingerprint":"","message":"QUJD"}')
refused('unknown-field', 'Refused: a field that is none of the three.', '{"iv":"AA==","fingerprint":"fp","message":"QUJD","alg":"none"}')
refused('upper-case-field', 'Refused: field names are exact.', '{"IV":"AA==","fingerprint":"fp","message":"QUJD"}')
refused('duplicate-by-escape', 'Refused: the same field twice, once escaped.', good.slice(0, -1) + ',"\\u0069v":"AA=="}')
refused('trailing-garbage', 'Refused: something follows the object.', good + 'x')
refused('two-objects', 'Refused: something follows the object.', good + good)
refused('trailing-nul', 'Refused: a NUL byte follows the object; it is no white space.', good + '\u0000')
refused('leading-nul', 'Refused: a NUL byte before the object.', '\u0000' + good)
refused('byte-order-mark', 'Refused: JSON on the wire has no byte order mark.', '\ufeff' + good)
refused('trailing-comma', 'Refused: a comma without a field behind it.', good.slice(0, -1) + ',}')
refused('leading-comma', 'Refused: a comma without a field before it.', '{,' + good.slice(1))
refused('missing-comma', 'Refused: no comma between fields.', good.replace(',', ' '))
refused('missing-colon', 'Refused: no colon.', good.replace(':', ' '))
refused('single-quotes', 'Refused: not JSON.', good.replaceAll('"', "'"))
refused('unquoted-names', 'Refused: not JSON, though the vendor\'s page writes it so.', '{iv:"AA==",fingerprint:"fp",message:"QUJD"}')
refused('comment', 'Refused: JSON has no comments.', '/* */' + good)
for (let n = 1; n < good.length; n += 6) refused(`cut-at-${String(n).padStart(2, '0')}`, 'Refused: cut short.', good.slice(0, n))
refused('control-character', 'Refused: a line break inside a string must be escaped.', '{"iv":"AA==","fingerprint":"fp","message":"QU\nJD"}')
refused('nul-in-string', 'Refused: a NUL byte inside a string must be escaped.', '{"iv":"AA==","fingerprint":"fp","message":"QU\u0000JD"}')
refused('unknown-escape', 'Refused: no such escape.', '{"iv":"AA==","fingerprint":"fp","message":"\\x41"}')
refused('short-unicode-escape', 'Refused: an escape of three digits.', '{"iv":"AA==","fingerprint":"fp","message":"\\u041"}')
refused('unicode-escape-not-hex', 'Refused: an escape with a digit that is none.', '{"iv":"AA==","fingerprint":"fp","message":"\\u00g1"}')
refused('escape-at-end', 'Refused: the backslash escapes the closing quote.', '{"iv":"AA==","fingerprint":"fp","message":"QUJD\\"}')
refused('high-surrogate-alone', 'Refused: half of a surrogate pair.', '{"iv":"AA==","fingerprint":"fp","message":"\\ud83c"}')
refused('low-surrogate-alone', 'Refused: half of a surrogate pair.', '{"iv":"AA==","fingerprint":"fp","message":"\\udf5f"}')
refused('surrogates-reversed', 'Refused: the halves are in the wrong order.', '{"iv":"AA==","fingerprint":"fp","message":"\\udf5f\\ud83c"}')
refused('high-surrogate-twice', 'Refused: two first halves.', '{"iv":"AA==","fingerprint":"fp","message":"\\ud83c\\ud83c"}')
refused('high-surrogate-and-letter', 'Refused: half of a surrogate pair and another escape.', '{"iv":"AA==","fingerprint":"fp","message":"\\ud83c\\u0041"}')
const within = b => Buffer.concat([Buffer.from('{"iv":"AA==","fingerprint":"fp","message":"'), Buffer.from(b), Buffer.from('"}')])
refused('utf8-lone-continuation', 'Refused: not UTF-8.', within([0x80]))
refused('utf8-cut-short', 'Refused: not UTF-8.', within([0xe2, 0x82]))
refused('utf8-overlong', 'Refused: not UTF-8.', within([0xc0, 0xaf]))
refused('utf8-surrogate', 'Refused: not UTF-8: a surrogate, encoded.', within([0xed, 0xa0, 0xbd]))
refused('utf8-beyond-unicode', 'Refused: not UTF-8: beyond U+10FFFF.', within([0xf4, 0x90, 0x80, 0x80]))
refused('utf8-behind-escape', 'Refused: not UTF-8, behind an escape.', within([0x5c, 0x6e, 0xff]))
refused('utf16', 'Refused: UTF-16.', Buffer.from(good, 'utf16le'))

// HTTP ---------------------------------------------------------------------------------------------------------------------------

const http = (name, comment, headers, body, expect = 'headers', more = {}) => vector(`http-${name}`, 'http', comment, { headers, body, expect, ...more })
http('both', 'Read. The body is the message, untouched, line break and all.', [['sec-iv', 'AA=='], ['sec-fingerprint', 'fp'], ['content-type', 'application/json']], 'QUJD\n', 'ok', { iv: 'AA==', fingerprint: 'fp', message: 'QUJD\n' })
http('any-case', 'Read. Header names have no case.', [['SEC-IV', 'AA=='], ['Sec-FingerPrint', 'FP']], 'QUJD', 'ok', { iv: 'AA==', fingerprint: 'FP', message: 'QUJD' })
http('quoted-body', 'Read. A body in quotes is not unquoted here.', [['sec-iv', 'AA=='], ['sec-fingerprint', 'fp']], '"QUJD"', 'ok', { iv: 'AA==', fingerprint: 'fp', message: '"QUJD"' })
http('empty-body', 'Read. Whether the message opens is asked later.', [['sec-iv', 'AA=='], ['sec-fingerprint', 'fp']], '', 'ok', { iv: 'AA==', fingerprint: 'fp', message: '' })
http('neither', 'Refused: both headers are missing.', [], 'QUJD')
http('only-iv', 'Refused: the fingerprint is missing.', [['sec-iv', 'AA==']], 'QUJD')
http('only-fingerprint', 'Refused: the IV is missing.', [['sec-fingerprint', 'fp']], 'QUJD')
http('empty-iv', 'Refused: an empty header is a missing one.', [['sec-iv', ''], ['sec-fingerprint', 'fp']], 'QUJD')
http('empty-fingerprint', 'Refused: an empty header is a missing one.', [['sec-iv', 'AA=='], ['sec-fingerprint', '']], 'QUJD')
http('iv-twice', 'Refused: the IV is there twice; which one counts would be a guess.', [['sec-iv', 'AA=='], ['sec-iv', 'AQ=='], ['sec-fingerprint', 'fp']], 'QUJD')
http('fingerprint-twice-the-same', 'Refused: twice, though with the same value.', [['sec-iv', 'AA=='], ['sec-fingerprint', 'fp'], ['Sec-Fingerprint', 'fp']], 'QUJD')

// Which key ------------------------------------------------------------------------------------------------------------------------

const old = { fingerprint: 'old', passphrase: 'the old phrase', valid_after: '2025-05-01T00:00:00Z', valid_until: '2025-06-08T00:00:00Z', seal_from: '' }
const next = { fingerprint: 'new', passphrase: 'the new phrase', valid_after: '2025-06-01T00:00:00Z', valid_until: '2025-07-08T00:00:00Z', seal_from: '2025-06-01T00:02:00Z' }
const accept = (name, comment, key, now, skew, expect) => {
  const s = sealed('accept-' + name, gcm, { passphrase: key.passphrase, fingerprint: key.fingerprint })
  vector('accept-' + name, 'accept', comment, { settings: gcm, keys: [old, next], now, skew_seconds: skew, triple: tripleJSON(s.iv, s.fingerprint, s.message), ...(expect === 'ok' ? { plaintext: order } : {}), expect })
}
accept('current', 'Accepted: inside the validity.', old, '2025-05-20T12:00:00Z', 0, 'ok')
accept('overlap-old', 'Accepted: both keys are valid, the old one names itself.', old, '2025-06-03T00:00:00Z', 0, 'ok')
accept('overlap-new', 'Accepted: both keys are valid, the new one names itself.', next, '2025-06-03T00:00:00Z', 0, 'ok')
accept('first-instant', 'Accepted: valid_after itself is inside.', next, '2025-06-01T00:00:00Z', 0, 'ok')
accept('last-instant', 'Refused: valid_until itself is outside.', old, '2025-06-08T00:00:00Z', 0, 'key-not-valid')
accept('too-early', 'Refused: a second early, no skew.', next, '2025-05-31T23:59:59Z', 0, 'key-not-valid')
accept('too-early-within-skew', 'Accepted: two minutes early, two minutes of skew.', next, '2025-05-31T23:58:00Z', 120, 'ok')
accept('too-early-beyond-skew', 'Refused: a second more than the skew.', next, '2025-05-31T23:57:59Z', 120, 'key-not-valid')
accept('too-late-within-skew', 'Accepted: a second less than the skew.', old, '2025-06-08T00:01:59Z', 120, 'ok')
accept('too-late-beyond-skew', 'Refused: the skew is over.', old, '2025-06-08T00:02:00Z', 120, 'key-not-valid')
accept('unknown', 'Refused: the ring has no such key.', { fingerprint: 'other', passphrase: 'the old phrase' }, '2025-06-03T00:00:00Z', 120, 'unknown-fingerprint')

const primary = (name, comment, keys, now, fingerprint) => vector('primary-' + name, 'primary', comment, { settings: gcm, keys, now, ...(fingerprint ? { fingerprint, expect: 'ok' } : { expect: 'no-key' }) })
primary('only-old', 'The old key: the new one is not valid yet.', [old, next], '2025-05-20T00:00:00Z', 'old')
primary('before-seal-from', 'The old key: the new one is valid, and sealing with it has not begun.', [old, next], '2025-06-01T00:01:59Z', 'old')
primary('at-seal-from', 'The new key: sealing with it begins.', [old, next], '2025-06-01T00:02:00Z', 'new')
primary('order-is-free', 'The new key, in whatever order the keys were given.', [next, old], '2025-06-03T00:00:00Z', 'new')
primary('early-for-want-of-another', 'The new key before its seal_from, since no other key is valid.', [next], '2025-06-01T00:01:00Z', 'new')
primary('both-early', 'The newer key, since sealing has begun with neither.', [{ ...old, seal_from: '2025-06-07T00:00:00Z' }, next], '2025-06-01T00:01:00Z', 'new')
primary('newest-by-valid-after', 'The key with the later valid_after, though it ends first.', [old, { ...next, valid_until: '2025-06-05T00:00:00Z' }], '2025-06-03T00:00:00Z', 'new')
primary('same-valid-after', 'Of two keys that begin at once, the one that ends later.', [{ ...old, fingerprint: 'a' }, { ...old, fingerprint: 'b', valid_until: '2025-06-09T00:00:00Z' }], '2025-06-03T00:00:00Z', 'b')
primary('same-validity', 'Of two keys with one validity, the lower fingerprint, so that every process seals with the same.', [{ ...old, fingerprint: 'b' }, { ...old, fingerprint: 'a' }], '2025-06-03T00:00:00Z', 'a')
primary('none-valid', 'No key: all have ended.', [old, next], '2025-07-08T00:00:00Z')
primary('no-keys', 'No key: the ring is empty.', [], '2025-06-03T00:00:00Z')

// Binding --------------------------------------------------------------------------------------------------------------------------

const u32 = n => { const b = Buffer.alloc(4); b.writeUInt32BE(n); return b }
const u64 = n => { const b = Buffer.alloc(8); b.writeBigUInt64BE(BigInt.asUintN(64, BigInt(n))); return b }
const field = b => Buffer.concat([u32(Buffer.byteLength(b)), Buffer.from(b)])
const covered = (...fields) => Buffer.concat([Buffer.of(1), ...fields].map(field))
const subKey = (secret, label) => Buffer.from(hkdfSync('sha256', secret, '', label, 32))
const mac = (secret, label, input) => createHmac('sha256', subKey(secret, label)).update(input).digest()

const secrets = { b2: bytes('binding key b2', 32), b1: bytes('binding key b1', 32) }
const lane = bytes('lane key', 32)
const binding = { site: 'store-0113', lane_hex: lane.toString('hex'), keys: Object.entries(secrets).map(([id, s]) => ({ id, secret_hex: s.toString('hex') })) }

const eventInput = e => covered(e.site, e.kind, e.edge, e.epoch, u64(e.seq), u64(e.from), e.id, u64(e.accepted), u64(e.deadline), e.order, e.via, e.iv, e.fingerprint, e.message)
const eventTag = (id, e) => mac(secrets[id], 'kb-event-tag', eventInput(e)).toString('base64url')
const es = sealed('event', ctr)
// Integers are decimal texts here: some do not fit a JSON number.
const event = { site: 'store-0113', kind: 'order', edge: 'edge-1', epoch: '01jt3z8k3n', from: '42', seq: '42', id: '01JT3Z8K3N4M5P6Q7R8S9TAVBW', accepted: '1746100000000', deadline: '1746100600000', order: 'abcdefghijklmnopqrstuvwxyz234567', via: 'hub', iv: es.iv, fingerprint: es.fingerprint, message: es.message }

const tagOK = (name, comment, change = {}, bind = 'b2') => {
  const e = { ...event, ...change }
  vector('event-tag-' + name, 'event-tag', comment, { binding, event: e, bind, covered_hex: eventInput(e).toString('hex'), tag: eventTag(bind, e), expect: 'ok' })
}
const tagBad = (name, comment, change = {}, { bind = 'b2', tag = eventTag('b2', event), from = binding } = {}) =>
  vector('event-tag-' + name, 'event-tag', comment, { binding: from, event: { ...event, ...change }, bind, tag, expect: 'tag' })
tagOK('plain', 'Verifies.')
tagOK('retired-key', 'Verifies with an older binding key that is still held.', {}, 'b1')
tagOK('no-order', 'Verifies. An absent order key is a field of no bytes.', { order: '' })
tagOK('run', 'Verifies. An event that stands for the sequences 40 to 42.', { from: '40', kind: 'expired' })
tagOK('large-numbers', 'Verifies. Sequences are unsigned, times are signed 64-bit numbers.', { seq: '18446744073709551615', from: '9223372036854775808', accepted: '-1', deadline: '9223372036854775807' })
tagOK('unicode', 'Verifies. Lengths count UTF-8 bytes.', { message: 'é€\u{1F35F}' })
tagBad('moved-site', 'Refused: moved to another site, whose bridge looks with its own binding.', {}, { from: { ...binding, site: 'store-0114' } })
tagBad('renamed-site', 'Refused: the event names another site.', { site: 'store-0114' })
tagBad('renamed-site-and-binding', 'Refused: event and binding of another site that holds the same keys; the tag is of the first.', { site: 'store-0114' }, { from: { ...binding, site: 'store-0114' } })
tagBad('moved-kind', 'Refused: an order shown as an alert.', { kind: 'alert' })
tagBad('other-edge', 'Refused: another edge.', { edge: 'edge-2' })
tagBad('other-epoch', 'Refused: another epoch.', { epoch: '01jt3z8k3p' })
tagBad('other-seq', 'Refused: another sequence.', { seq: '43' })
tagBad('other-from', 'Refused: another first sequence.', { from: '41' })
tagBad('zero-from', 'Refused: a first sequence of 0 is not "the same as the sequence".', { from: '0' })
tagBad('other-id', 'Refused: another id.', { id: '01JT3Z8K3N4M5P6Q7R8S9TAVBX' })
tagBad('other-accepted', 'Refused: another time of acceptance.', { accepted: '1746100000001' })
tagBad('other-deadline', 'Refused: a later deadline.', { deadline: '1746100600001' })
tagBad('other-order', 'Refused: another order key.', { order: 'abcdefghijklmnopqrstuvwxyz234566' })
tagBad('order-dropped', 'Refused: the order key is missing.', { order: '' })
tagBad('other-via', 'Refused: another way.', { via: 'store' })
tagBad('other-iv', 'Refused: another IV.', { iv: bytes('x', 16).toString('base64') })
tagBad('other-fingerprint', 'Refused: another fingerprint.', { fingerprint: 'fp' })
tagBad('flipped-message', 'Refused: the message is altered, which a256ctr alone would not notice.', { message: 'A' + event.message.slice(1) })
tagBad('message-line-break', 'Refused: the tag covers the text as it stands, trailing line break and all.', { message: event.message + '\n' })
tagBad('shifted-boundary', 'Refused: the same characters, cut into fields elsewhere.', { site: 'store-0113o', kind: 'rder' })
tagBad('unknown-bind', 'Refused: no such binding key.', {}, { bind: 'b3' })
tagBad('empty-bind', 'Refused: no binding key is named.', {}, { bind: '' })
tagBad('wrong-bind', 'Refused: tagged with another binding key than the one named.', {}, { bind: 'b1' })
tagBad('report-key', 'Refused: made with the key of report tags.', {}, { tag: mac(secrets.b2, 'kb-report-tag', eventInput(event)).toString('base64url') })
tagBad('empty', 'Refused: no tag.', {}, { tag: '' })
tagBad('truncated', 'Refused: half of the tag.', {}, { tag: eventTag('b2', event).slice(0, 22) })
tagBad('padded', 'Refused: a tag has no padding.', {}, { tag: eventTag('b2', event) + '=' })
tagBad('hex', 'Refused: a tag is base64url.', {}, { tag: Buffer.from(eventTag('b2', event), 'base64url').toString('hex') })
{
  const t = eventTag('b2', event)
  const alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'
  tagBad('spare-bits', 'Refused: the same bytes by another text; the unused bits of the last character are zero.', {}, { tag: t.slice(0, -1) + alphabet[alphabet.indexOf(t.at(-1)) ^ 1] })
  tagBad('upper-case', 'Refused: a tag has case.', {}, { tag: t.toUpperCase() })
}

// Seals under a binding key -----------------------------------------------------------------------------------------------------------

function bindingSealed (label, id, plaintext) {
  const key = subKey(secrets[id], label)
  const iv = bytes(label + id + plaintext, 12)
  const ciphertext = encrypt('a256gcm', key, iv, Buffer.from(plaintext))
  return { key, iv, ciphertext, json: tripleJSON(iv.toString('base64'), 'kb:' + id, ciphertext.toString('base64')) }
}
const answer = '{"status":200,"headers":{"content-type":"application/json"},"body":"eyJvayI6dHJ1ZX0="}'
for (const [kind, label, plaintext, what] of [['report-seal', 'kb-report-seal', answer, 'a Kitchen\'s answer'], ['plain-seal', 'kb-plain-seal', order, 'an order of a site without encryption']]) {
  const other = kind === 'report-seal' ? 'kb-plain-seal' : 'kb-report-seal'
  const opens = (name, comment, id) => {
    const s = bindingSealed(label, id, plaintext)
    vector(`${kind}-${name}`, kind, comment, { binding, sub_key_hex: s.key.toString('hex'), triple: s.json, plaintext, expect: 'ok' })
  }
  opens('plain', `Opens: ${what}, sealed under ${label}.`, 'b2')
  opens('retired-key', 'Opens with an older binding key that is still held.', 'b1')
  const fails = (name, expect, comment, json) => vector(`${kind}-${name}`, kind, comment, { binding, triple: json, expect })
  const s = bindingSealed(label, 'b2', plaintext)
  const iv = s.iv.toString('base64')
  const message = s.ciphertext.toString('base64')
  const flipped = Buffer.from(s.ciphertext); flipped[3] ^= 4
  fails('flipped-bit', 'decrypt', 'Refused: one bit is flipped.', tripleJSON(iv, 'kb:b2', flipped.toString('base64')))
  fails('other-key', 'decrypt', 'Refused: the fingerprint names another binding key than the one that sealed.', tripleJSON(iv, 'kb:b1', message))
  fails('other-label', 'decrypt', `Refused: sealed under ${other}.`, bindingSealed(other, 'b2', plaintext).json)
  fails('unknown-key', 'unknown-fingerprint', 'Refused: no such binding key.', tripleJSON(iv, 'kb:b3', message))
  fails('no-prefix', 'unknown-fingerprint', 'Refused: the fingerprint lacks the prefix of binding keys.', tripleJSON(iv, 'b2', message))
  fails('no-id', 'unknown-fingerprint', 'Refused: the fingerprint is the prefix alone.', tripleJSON(iv, 'kb:', message))
  fails('hex', 'iv', 'Refused: what is sealed under a binding key is always base64.', tripleJSON(s.iv.toString('hex'), 'kb:b2', s.ciphertext.toString('hex')))
}

const rs = bindingSealed('kb-report-seal', 'b2', answer)
const report = { site: 'store-0113', edge: 'edge-1', epoch: '01jt3z8k3n', seq: '42', id: event.id, endpoint: 'kitchen-main', n: '0', state: 'delivered', reason: '', status: '200', attempts: '2', started: '1746100000100', settled: '1746100000350', iv: rs.iv.toString('base64'), fingerprint: 'kb:b2', message: rs.ciphertext.toString('base64') }
const reportInput = r => covered(r.site, r.edge, r.epoch, u64(r.seq), r.id, r.endpoint, u64(r.n), r.state, r.reason, u64(r.status), u64(r.attempts), u64(r.started), u64(r.settled), r.iv, r.message)
const reportTag = (id, r) => mac(secrets[id], 'kb-report-tag', reportInput(r)).toString('base64url')
const reportOK = (name, comment, change = {}, bind = 'b2') => {
  const r = { ...report, ...change }
  vector('report-tag-' + name, 'report-tag', comment, { binding, report: r, bind, covered_hex: reportInput(r).toString('hex'), tag: reportTag(bind, r), expect: 'ok' })
}
const reportBad = (name, comment, change = {}, { bind = 'b2', tag = reportTag('b2', report), from = binding } = {}) =>
  vector('report-tag-' + name, 'report-tag', comment, { binding: from, report: { ...report, ...change }, bind, tag, expect: 'tag' })
reportOK('plain', 'Verifies.')
reportOK('retired-key', 'Verifies with an older binding key that is still held.', {}, 'b1')
reportOK('failed', 'Verifies. A delivery that reached no endpoint.', { endpoint: '-', state: 'failed', reason: 'expired', status: '0', attempts: '0' })
reportOK('replay', 'Verifies. The third replay.', { n: '3' })
reportBad('moved-site', 'Refused: looked at with the binding of another site.', {}, { from: { ...binding, site: 'store-0114' } })
for (const [name, value] of Object.entries({ site: 'store-0114', edge: 'edge-2', epoch: 'x', seq: '43', id: 'x', endpoint: 'kitchen-backup', n: '1', state: 'failed', reason: 'expired', status: '201', attempts: '3', started: '1746100000101', settled: '1746100000351', iv: 'AA==', message: 'AAAA' })) {
  reportBad('other-' + name, `Refused: another ${name}.`, { [name]: value })
}
reportBad('event-key', 'Refused: made with the key of event tags.', {}, { tag: mac(secrets.b2, 'kb-event-tag', reportInput(report)).toString('base64url') })
reportBad('unknown-bind', 'Refused: no such binding key.', {}, { bind: 'b3' })
reportBad('truncated', 'Refused: half of the tag.', {}, { tag: reportTag('b2', report).slice(0, 22) })

// Ids and hashes of the lane key --------------------------------------------------------------------------------------------------------

function base32 (b) {
  const digits = 'abcdefghijklmnopqrstuvwxyz234567'
  let bits = 0n
  for (const x of b) bits = bits << 8n | BigInt(x)
  let text = ''
  for (let i = BigInt(b.length * 8) - 5n; i >= 0n; i -= 5n) text += digits[Number(bits >> i & 31n)]
  return text
}
const laneHex = lane.toString('hex')
const id = (label, ...fields) => base32(mac(lane, label, covered(...fields)).subarray(0, 20))
const orderHash = (name, comment, orderID) => vector('order-' + name, 'order', comment, { lane_hex: laneHex, order_id: orderID, want: orderID === '' ? '' : id('kb-order', orderID) })
orderHash('plain', 'The order key of an order.', '65f1c0ffee')
orderHash('unicode', 'The id is hashed as its UTF-8 bytes.', 'Tisch 7 \u{1F35F}')
orderHash('none', 'Without an id there is no order key.', '')
const messageID = (name, comment, site, pos, kind, key) => vector('message-id-' + name, 'message-id', comment, { lane_hex: laneHex, site, pos, kind_of_event: kind, key, want: id('kb-message-id', site, pos, kind, key) })
messageID('plain', 'Kb-Id of a request with an Idempotency-Key.', 'store-0113', 'till-1', 'order', '7f3c')
messageID('other-pos', 'The same key of another POS gives another id.', 'store-0113', 'till-2', 'order', '7f3c')
messageID('shifted-boundary', 'The same characters, cut into fields elsewhere, give another id.', 'store-0113', 'till-1o', 'rder', '7f3c')
messageID('no-pos', 'A POS without identity (authorization: none) is a field of no bytes.', 'store-0113', '', 'order', '7f3c')
const envelopeID = (name, comment, site, pos, kind, fingerprint, iv) => vector('envelope-id-' + name, 'envelope-id', comment, { lane_hex: laneHex, site, pos, kind_of_event: kind, fingerprint, iv, want: id('kb-envelope-id', site, pos, kind, fingerprint, iv) })
envelopeID('plain', 'Kb-Id of an encrypted request without an Idempotency-Key: fingerprint and IV, as texts.', 'store-0113', 'till-1', 'order', es.fingerprint, es.iv)
envelopeID('other-iv', 'Another IV is another message.', 'store-0113', 'till-1', 'order', es.fingerprint, 'AAAAAAAAAAAAAAAAAAAAAA==')
const payloadHash = (name, comment, kind, payload) => vector('payload-hash-' + name, 'payload-hash', comment, { lane_hex: laneHex, kind_of_event: kind, payload, want_hex: mac(lane, 'kb-payload-hash', covered(kind, payload)).toString('hex') })
payloadHash('plain', 'The keyed hash of an opened payload.', 'order', order)
payloadHash('other-kind', 'The same payload as another kind.', 'alert', order)
payloadHash('empty', 'No payload.', 'order', '')

// Write or check -----------------------------------------------------------------------------------------------------------------------

const present = readdirSync(folder).filter(f => f.endsWith('.json'))
const stale = present.filter(f => !files.has(f.slice(0, -5)))
if (process.argv[2] === '--check') {
  const wrong = [...files].filter(([name, text]) => !present.includes(name + '.json') || readFileSync(join(folder, name + '.json'), 'utf8') !== text).map(([name]) => name + '.json')
  for (const f of wrong) console.error(`${f}: differs or is missing`)
  for (const f of stale) console.error(`${f}: not made by this script`)
  if (wrong.length + stale.length > 0) process.exit(1)
} else {
  for (const f of stale) rmSync(join(folder, f))
  for (const [name, text] of files) writeFileSync(join(folder, name + '.json'), text)
}
console.log(`${files.size} vectors`)
