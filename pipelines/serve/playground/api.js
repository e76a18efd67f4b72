// The server's API, as any OpenAI client would use it. The key lives as long as the tab.

const KEY = 'mmicl-api-key'
let askForKey = async () => false
let asking = null

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message)
    this.status = status
  }
}

export const key = () => sessionStorage.getItem(KEY)
export const keepKey = value => sessionStorage.setItem(KEY, value)
export const forgetKey = () => sessionStorage.removeItem(KEY)

/** `ask(refused)` gives a promise of whether there is another key to try; `refused` is whether one was. */
export function onKeyWanted(ask) {
  askForKey = ask
}

/** The response to a request, once the server lets it in. */
export async function call(path, {method = 'GET', body, type, signal} = {}) {
  for (;;) {
    const used = key()
    const response = await send(path, {method, body, signal, headers: headers(used, type)})
    if (response.ok) return response
    const error = await explain(response)
    if (error.status !== 401) throw error
    if (key() !== used) continue
    asking ??= askForKey(Boolean(used)).finally(() => { asking = null })
    if (!(await asking)) throw error
  }
}

const asJson = body => ({method: 'POST', body: JSON.stringify(body), type: 'application/json'})
const packPath = id => `/v1/demo_packs/${encodeURIComponent(id)}`

export const models = async () => (await (await call('/v1/models')).json()).data
export const packs = async () => (await (await call('/v1/demo_packs')).json()).data
export const makePack = async body => (await call('/v1/demo_packs', asJson(body))).json()
export const deletePack = id => call(packPath(id), {method: 'DELETE'})
export const exportPack = async id => (await call(`${packPath(id)}/export`)).blob()
export const importPack = async file =>
  (await call('/v1/demo_packs/import', {method: 'POST', body: file, type: 'application/octet-stream'})).json()

/** The chunks of a streamed answer. */
export async function* chat(body, signal) {
  const asked = {...body, stream: true, stream_options: {include_usage: true}}
  const response = await call('/v1/chat/completions', {...asJson(asked), signal})
  let ended = false
  for await (const data of events(response.body)) {
    if (data === '[DONE]') {
      ended = true
      continue
    }
    const chunk = JSON.parse(data)
    if (chunk.error) throw new ApiError(chunk.error.message)
    yield chunk
  }
  if (!ended) throw new ApiError('The answer broke off: the server ended the stream too early.')
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ''
  try {
    for (;;) {
      const {done, value} = await unbroken(reader.read())
      if (done) return
      const blocks = (rest + value).split(/\r?\n\r?\n/)
      rest = blocks.pop()
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter(line => line.startsWith('data:'))
        if (lines.length) yield lines.map(line => line.slice(5).trimStart()).join('\n')
      }
    }
  } finally {
    // An answer that nobody reads any more need not be written.
    reader.cancel().catch(() => {})
  }
}

const headers = (secret, type) => ({
  ...(secret && {Authorization: `Bearer ${secret}`}),
  ...(type && {'Content-Type': type}),
})

const send = (path, options) => unbroken(fetch(path, options))

async function unbroken(answer) {
  try {
    return await answer
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new ApiError(
      'The connection broke: the server is gone, or what was sent was too large. Check it and try again.')
  }
}

async function explain(response) {
  const text = await response.text()
  let message = `${response.status} ${response.statusText}`
  try {
    message = JSON.parse(text).error.message ?? message
  } catch {
    // Something in front of the server answered, in words of its own.
  }
  const seconds = Math.ceil(Number(response.headers.get('Retry-After')))
  const later = seconds > 0 ? ` Try again in ${seconds === 1 ? '1 second' : `${seconds} seconds`}.` : ''
  return new ApiError(`Refused (${response.status}): ${message}${later && '.'}${later}`, response.status)
}
