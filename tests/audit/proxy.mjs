// Stands in for Caddy (docker/Caddyfile): one address, /live/ to the ASGI process, all else to the WSGI one, texts
// compressed on their way out unless they come compressed. node proxy.mjs PORT WEB_PORT LIVE_PORT
import { createServer, request as forward } from "node:http";
import { pipeline } from "node:stream";
import { createGzip } from "node:zlib";

const [port, webPort, livePort] = process.argv.slice(2).map(Number);
const COMPRESSED = /^(text\/(html|css|plain|csv|javascript|xml)|application\/(json|javascript|problem\+json)|image\/svg)/;
const SMALLEST_BYTES = 512; // as Caddy's `encode`

createServer((asked, answered) => {
  const headers = { ...asked.headers, "x-forwarded-for": asked.socket.remoteAddress, "x-forwarded-proto": "http" };
  const target = { host: "127.0.0.1", port: asked.url.startsWith("/live/") ? livePort : webPort };
  const onward = forward({ ...target, method: asked.method, path: asked.url, headers }, (answer) => {
    const kind = answer.headers["content-type"] || "";
    const isSmall = Number(answer.headers["content-length"] ?? Infinity) < SMALLEST_BYTES;
    const takesGzip = /\bgzip\b/.test(asked.headers["accept-encoding"] || "");
    if (!takesGzip || isSmall || answer.headers["content-encoding"] || !COMPRESSED.test(kind)) {
      answered.writeHead(answer.statusCode, answer.headers);
      pipeline(answer, answered, () => {});
      return;
    }
    const { "content-length": _, ...others } = answer.headers;
    answered.writeHead(answer.statusCode, { ...others, "content-encoding": "gzip", vary: addVary(others.vary) });
    pipeline(answer, createGzip(), answered, () => {});
  });
  onward.on("error", () => (answered.headersSent ? answered.destroy() : answered.writeHead(502).end()));
  answered.on("close", () => onward.destroy()); // a reader who leaves ends the stream behind it
  asked.pipe(onward);
}).listen(port, "127.0.0.1");

function addVary(vary) {
  return vary ? `${vary}, Accept-Encoding` : "Accept-Encoding";
}
