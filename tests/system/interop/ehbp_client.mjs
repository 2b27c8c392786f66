// The published EHBP client for JavaScript (npm `ehbp`), as it comes.
//
// Stdin: {url, requests: [{name, path, headers, body}]}. Stdout: {answers: {name: ...}}.

import { text } from "node:stream/consumers";
import { createTransport } from "ehbp";

const { url, requests } = JSON.parse(await text(process.stdin));
const transport = await createTransport(url);
const answers = {};
for (const { name, path, headers, body } of requests) {
  const began = performance.now();
  const response = await transport.post(url + path, JSON.stringify(body), { headers });
  const arrivals = [];
  const decoder = new TextDecoder();
  let read = "";
  for await (const bytes of response.body) {
    arrivals.push({ at: performance.now() - began, size: bytes.length });
    read += decoder.decode(bytes, { stream: true });
  }
  answers[name] = {
    status: response.status,
    type: response.headers.get("content-type"),
    ended: performance.now() - began,
    arrivals,
    body: read,
  };
}
console.log(JSON.stringify({ answers }));
