// An Oblivious HTTP client made of packages that nobody here wrote: HPKE from @hpke/core and @hpke/hybridkem-x-wing,
// binary HTTP from bhttp-js. The key list, the response's keys and the chunks are written here, from RFC 9458 and
// draft-ietf-ohai-chunked-ohttp-08. It shares no code with the gateway.
//
// Stdin: {url, requests: [{name, kem, chunked, method, path, headers, body}]}. Stdout: {keys, answers: {name: ...}}.

import { hkdfSync, webcrypto } from "node:crypto";
import { text } from "node:stream/consumers";
import { Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from "@hpke/core";
import { XWing } from "@hpke/hybridkem-x-wing";
import { BHttpDecoder, BHttpEncoder } from "bhttp-js";

const GATEWAY = "/.well-known/ohttp-gateway";
const KEMS = {
  0x0020: { make: () => new DhkemX25519HkdfSha256(), publicKeyLength: 32 },
  0x647a: { make: () => new XWing(), publicKeyLength: 1216 },
};
const AES_256_GCM = { kdf: 1, aead: 2, keyLength: 32, nonceLength: 12 };
const FINAL = utf8("final");
const NONE = new Uint8Array(0);

function utf8(string) {
  return new TextEncoder().encode(string);
}

function join(...parts) {
  return new Uint8Array(Buffer.concat(parts.map((part) => new Uint8Array(part))));
}

function u16(value) {
  return new Uint8Array([value >> 8, value & 0xff]);
}

// Variable-length integers (RFC 9000, 16).

function varint(value) {
  if (value < 64) return new Uint8Array([value]);
  if (value < 16384) return u16(value | 0x4000);
  const out = new DataView(new ArrayBuffer(4));
  out.setUint32(0, (value | 0x80000000) >>> 0);
  return new Uint8Array(out.buffer);
}

/** [value, next offset], or null where the integer is not complete. */
function readVarint(bytes, at) {
  if (at >= bytes.length) return null;
  const length = 1 << (bytes[at] >> 6);
  if (at + length > bytes.length) return null;
  let value = bytes[at] & 0x3f;
  for (let i = 1; i < length; i++) value = value * 256 + bytes[at + i];
  return [value, at + length];
}

/** application/ohttp-keys (RFC 9458, 3): those with a KEM known here and AES-256-GCM, in the list's order. */
function readKeys(list) {
  const keys = [];
  for (let at = 0; at < list.length; ) {
    const length = (list[at] << 8) | list[at + 1];
    const item = list.subarray(at + 2, at + 2 + length);
    if (item.length !== length) throw new Error("the key list is cut");
    at += 2 + length;
    const kem = (item[1] << 8) | item[2];
    if (!KEMS[kem]) continue;
    const end = 3 + KEMS[kem].publicKeyLength;
    const pairs = item.subarray(end + 2);
    if (pairs.length !== ((item[end] << 8) | item[end + 1])) throw new Error("the lengths do not add up");
    for (let i = 0; i < pairs.length; i += 4) {
      if (((pairs[i] << 8) | pairs[i + 1]) !== AES_256_GCM.kdf) continue;
      if (((pairs[i + 2] << 8) | pairs[i + 3]) !== AES_256_GCM.aead) continue;
      keys.push({ id: item[0], kem, publicKey: item.slice(3, end) });
      break;
    }
  }
  return keys;
}

/** Seals `message` to `key`: {pieces of the body, what opens the response}. */
async function seal(key, message, chunked) {
  const form = chunked ? "chunked " : "";
  const header = join(new Uint8Array([key.id]), u16(key.kem), u16(AES_256_GCM.kdf), u16(AES_256_GCM.aead));
  const suite = new CipherSuite({ kem: KEMS[key.kem].make(), kdf: new HkdfSha256(), aead: new Aes256Gcm() });
  const context = await suite.createSenderContext({
    recipientPublicKey: await suite.kem.deserializePublicKey(key.publicKey),
    info: join(utf8(`message/bhttp ${form}request`), new Uint8Array(1), header),
  });
  const pieces = [join(header, context.enc)];
  if (chunked) {
    // Two chunks, then an empty last one for one KEM and a last one with content for the other: both are allowed.
    const ends = [Math.ceil(message.length / 3), key.kem === 0x0020 ? message.length : Math.ceil(message.length / 2)];
    let start = 0;
    for (const end of ends) {
      const sealed = await context.seal(message.subarray(start, end), NONE);
      pieces.push(join(varint(sealed.byteLength), sealed));
      start = end;
    }
    pieces.push(join(new Uint8Array(1), await context.seal(message.subarray(start), FINAL)));
  } else {
    pieces.push(await context.seal(message, NONE));
  }
  const { keyLength, nonceLength } = AES_256_GCM;
  const secret = await context.export(utf8(`message/bhttp ${form}response`), Math.max(keyLength, nonceLength));
  return { pieces, opener: new ResponseOpener(new Uint8Array(context.enc), new Uint8Array(secret), chunked) };
}

class ResponseOpener {
  #enc;
  #secret;
  #chunked;
  #buffer = NONE;
  #key = null;
  #base = null;
  #count = 0;

  constructor(enc, secret, chunked) {
    this.#enc = enc;
    this.#secret = secret;
    this.#chunked = chunked;
  }

  async #open(sealed, aad) {
    const iv = this.#base.slice();
    new DataView(iv.buffer).setUint32(8, new DataView(iv.buffer).getUint32(8) ^ this.#count++);
    const parameters = { name: "AES-GCM", iv, additionalData: aad };
    return new Uint8Array(await webcrypto.subtle.decrypt(parameters, this.#key, sealed));
  }

  /** Plaintexts that became complete. */
  async feed(bytes) {
    this.#buffer = join(this.#buffer, bytes);
    const { keyLength, nonceLength } = AES_256_GCM;
    const length = Math.max(keyLength, nonceLength);
    if (!this.#key) {
      if (this.#buffer.length < length) return [];
      const salt = join(this.#enc, this.#buffer.subarray(0, length));
      const derive = (label, size) => new Uint8Array(hkdfSync("sha256", this.#secret, salt, utf8(label), size));
      this.#key = await webcrypto.subtle.importKey("raw", derive("key", keyLength), "AES-GCM", false, ["decrypt"]);
      this.#base = derive("nonce", nonceLength);
      this.#buffer = this.#buffer.slice(length);
    }
    const opened = [];
    while (this.#chunked) {
      const found = readVarint(this.#buffer, 0);
      if (!found || found[0] === 0 || this.#buffer.length < found[1] + found[0]) break;
      const [size, start] = found;
      const sealed = this.#buffer.slice(start, start + size);
      this.#buffer = this.#buffer.slice(start + size);
      opened.push(await this.#open(sealed, NONE));
    }
    return opened;
  }

  /** The last plaintext; throws where the response does not end with an authenticated last chunk. */
  async finish() {
    if (!this.#chunked) return this.#open(this.#buffer, NONE);
    const found = readVarint(this.#buffer, 0);
    if (!found || found[0] !== 0) throw new Error("the response has no last chunk");
    return this.#open(this.#buffer.slice(found[1]), FINAL);
  }
}

/** The content that is complete in the start of a binary HTTP response, in either framing. */
function contentSoFar(bytes) {
  const parts = [];
  let [framing, at] = readVarint(bytes, 0) ?? [null, 0];
  if (framing !== 3) return NONE;
  [, at] = readVarint(bytes, at) ?? [0, bytes.length];
  for (let inFields = true; ; ) {
    const found = readVarint(bytes, at);
    if (!found) break;
    const [length, start] = found;
    if (length === 0 && !inFields) break;
    if (start + length > bytes.length) break;
    if (length === 0) {
      inFields = false;
    } else if (inFields) {
      const value = readVarint(bytes, start + length);
      if (!value || value[1] + value[0] > bytes.length) break;
      at = value[1] + value[0];
      continue;
    } else {
      parts.push(bytes.subarray(start, start + length));
    }
    at = start + length;
  }
  return join(...parts);
}

async function send(url, keys, request) {
  const key = keys.find(({ kem }) => kem === request.kem);
  const message = await new BHttpEncoder().encodeRequest(
    new Request(`https://backend${request.path}`, {
      method: request.method,
      headers: request.headers,
      body: request.body === undefined ? undefined : JSON.stringify(request.body),
    }),
  );
  const target = request.staleKey ? { ...key, publicKey: await otherPublicKey(key.kem) } : key;
  const { pieces, opener } = await seal(target, new Uint8Array(message), request.chunked);
  const form = request.chunked ? "chunked-" : "";
  const began = performance.now();
  const response = await fetch(url + GATEWAY, {
    method: "POST",
    headers: { "content-type": `message/ohttp-${form}req` },
    // Chunked requests leave piece by piece, without a length.
    body: request.chunked ? ReadableStream.from(pieces) : join(...pieces),
    duplex: "half",
  });
  const outer = { status: response.status, type: response.headers.get("content-type") };
  if (outer.type !== `message/ohttp-${form}res`) return { outer, body: await response.text() };

  let plain = NONE;
  let told = 0;
  const arrivals = [];
  const take = (more) => {
    plain = join(plain, more);
    const content = contentSoFar(plain);
    if (content.length > told) arrivals.push({ at: performance.now() - began, size: content.length - told });
    told = content.length;
  };
  for await (const bytes of response.body) for (const opened of await opener.feed(bytes)) take(opened);
  take(await opener.finish());
  const ended = performance.now() - began;
  const inner = new BHttpDecoder().decodeResponse(plain);
  return {
    outer,
    plainLength: plain.length,
    arrivals,
    ended,
    inner: {
      status: inner.status,
      type: inner.headers.get("content-type"),
      body: await inner.text(),
      streamed: new TextDecoder().decode(contentSoFar(plain)),
    },
  };
}

async function otherPublicKey(kem) {
  const made = KEMS[kem].make();
  return new Uint8Array(await made.serializePublicKey((await made.generateKeyPair()).publicKey));
}

const { url, requests } = JSON.parse(await text(process.stdin));
const list = await fetch(url + GATEWAY);
const keys = readKeys(new Uint8Array(await list.arrayBuffer()));
const answers = {};
for (const request of requests) answers[request.name] = await send(url, keys, request);
const shown = keys.map(({ id, kem }) => ({ id, kem }));
console.log(JSON.stringify({ keys: { type: list.headers.get("content-type"), list: shown }, answers }));
