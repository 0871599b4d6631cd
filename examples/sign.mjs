// JavaScript (Node.js 18 or later, no packages): `sign` gives the headers that sign one request.
//
//   await signedFetch(secret, `${url}/containers/json?all=1`)
//   http.request({ host, port, method, path: target, headers: sign(secret, method, target, body) }).end(body)
//
// fetch would follow a redirect with the same headers; signedFetch does not follow it.
import { createHash, createHmac, randomUUID } from "node:crypto"
import { readFileSync, realpathSync } from "node:fs"
import { pathToFileURL } from "node:url"

// `body` is a string or bytes (a Buffer, a Uint8Array): exactly what is sent.
export function sign(secret, method, target, body = "", { key, timestamp = Date.now(), nonce = randomUUID() } = {}) {
    const hashed = createHash("sha256").update(body).digest("base64")
    const message = [method.toUpperCase(), target, timestamp, nonce, hashed].join("\n")
    return {
        "X-DR-Timestamp": `${timestamp}`,
        "X-DR-Nonce": nonce,
        "X-DR-Signature": createHmac("sha256", secret).update(message).digest("base64"),
        "X-DR-Content-SHA256": hashed,
        ...(key && { "X-DR-Key": key }),
    }
}

export function signedFetch(secret, url, { key, method = "GET", headers, body, ...options } = {}) {
    const { pathname, search } = new URL(url) // as fetch sends it: a URL quotes and straightens what it is given
    const signed = new Headers(headers)
    for (const [name, value] of Object.entries(sign(secret, method, pathname + search, body, { key })))
        signed.set(name, value)
    return fetch(url, { ...options, redirect: "manual", method: method.toUpperCase(), headers: signed, body })
}

if (process.argv[1] && import.meta.url === pathToFileURL(realpathSync(process.argv[1])).href) {
    const { DOCKER_RUNNER_URL: url, DOCKER_RUNNER_SHARED_SECRET: secret, DOCKER_RUNNER_KEY: key } = process.env
    const [method, target, file] = process.argv.slice(2)
    const body = file && readFileSync(file)
    const headers = file ? { "Content-Type": file.endsWith(".json") ? "application/json" : "application/x-tar" } : {}
    const answer = await signedFetch(secret, url.replace(/\/$/, "") + target, { method, body, headers, key })
    process.stdout.write(Buffer.from(await answer.arrayBuffer()))
    if (!answer.ok) console.error(`\nHTTP ${answer.status}`)
    process.exitCode = answer.ok ? 0 : 1
}
