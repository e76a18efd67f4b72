// One answer while it is written, with what it cost: tokens as the server counts them, times as seen here.

import {chat} from './api.js'
import {make, plural, say} from './dom.js'

/** Column of one way to ask. */
export class Answer {
  constructor(article) {
    this.state = make('span', {className: 'state soft small'})
    this.text = make('p', {className: 'text told', dir: 'auto', ariaLive: 'polite'})
    this.error = make('p', {className: 'error', hidden: true, role: 'alert'})
    this.facts = make('dl', {className: 'facts small'})
    article.querySelector('h3').append(this.state)
    article.append(this.text, this.error, this.facts)
    this.article = article
  }

  /** Forgets the last answer; `why` this one does not begin yet. */
  wait(why) {
    this.state.textContent = why
    this.text.textContent = ''
    say(this.error)
    this.facts.replaceChildren()
    this.article.classList.remove('writing')
  }

  /** What it cost, as {firstMs, serverMs, usage}; null where it failed. */
  async ask(body, signal) {
    this.wait('Reading')
    this.article.classList.add('writing')
    const cost = {firstMs: null, serverMs: null, usage: null}
    let cut = false
    const begun = performance.now()
    try {
      for await (const chunk of chat(body, signal)) {
        const choice = chunk.choices[0]
        if (choice?.delta.content) {
          cost.firstMs ??= performance.now() - begun
          this.state.textContent = 'Writing'
          this.text.append(choice.delta.content)
        }
        cut ||= choice?.finish_reason === 'length'
        cost.serverMs = chunk.mmicl?.ttft_ms ?? cost.serverMs
        cost.usage = chunk.usage ?? cost.usage
      }
    } catch (error) {
      this.state.textContent = error.name === 'AbortError' ? 'Stopped' : 'Failed'
      if (error.name !== 'AbortError') say(this.error, error)
      return null
    } finally {
      this.article.classList.remove('writing')
    }
    this.state.textContent = cut ? 'Cut at the limit of tokens' : 'Done'
    if (!this.text.textContent) this.state.textContent = 'Done: the answer is empty'
    this.showCost(cost)
    return cost
  }

  showCost({firstMs, serverMs, usage}) {
    const facts = []
    if (firstMs !== null) facts.push(['First token, here', milliseconds(firstMs)])
    if (serverMs !== null) facts.push(['First token, server', milliseconds(serverMs)])
    if (usage) {
      facts.push(['Prompt', plural(usage.prompt_tokens, 'token')])
      facts.push(['Answer', plural(usage.completion_tokens, 'token')])
      const cached = usage.prompt_tokens_details?.cached_tokens
      if (cached !== undefined) facts.push(['Already read', plural(cached, 'token')])
    }
    this.facts.replaceChildren(...facts.map(([name, value]) =>
      make('div', {}, make('dt', {}, name), make('dd', {}, value))))
  }
}

/** The demonstrations and a question as messages, written out. */
export const writtenOut = (demonstrations, question) => [
  ...demonstrations.flatMap(one => [user(one), {role: 'assistant', content: one.answer}]),
  user(question),
]

/** One user message: a picture and a question about it. */
export const user = ({url, question}) => ({
  role: 'user',
  content: [{type: 'image_url', image_url: {url}}, ...(question ? [{type: 'text', text: question}] : [])],
})

/** What the server had read of a prompt before: who asks with new demonstrations waits longer. */
export function kept({usage}) {
  const count = usage?.prompt_tokens_details?.cached_tokens
  return count ? `Written out, ${count.toLocaleString('en')} of ${plural(usage.prompt_tokens, 'token')} were kept `
    + 'from an earlier question; with other demonstrations the first token comes later.' : ''
}

/** Draws what both answers cost into `list`, and gives the sentence that sums it up. */
export function compare(list, pack, full) {
  const size = measure('Demonstrations', pack.usage?.demo_tokens_fused, full.usage?.demo_tokens_fused, TOKENS)
  const prompt = measure('Whole prompt', pack.usage?.prompt_tokens, full.usage?.prompt_tokens, TOKENS)
  const here = measure('First token, here', pack.firstMs, full.firstMs, TIME)
  const server = measure('First token, server', pack.serverMs, full.serverMs, TIME)
  list.replaceChildren(...[size, prompt, here, server].filter(Boolean).map(row))
  return [size && `The pack takes ${size.ratio} tokens`, here && `its first token comes ${here.ratio}`]
    .filter(Boolean).join(', and ') + '.'
}

function measure(name, pack, full, {unit, less, more}) {
  return Number.isFinite(pack) && Number.isFinite(full)
    ? {name, pack, full, unit, ratio: ratio(pack, full, less, more)} : null
}

function row({name, pack, full, unit, ratio}) {
  const most = Math.max(pack, full) || 1
  return make('li', {},
    make('p', {className: 'measure'}, make('span', {}, name), make('strong', {}, ratio)),
    bar('pack', 'first', pack, most, unit), bar('written out', 'second', full, most, unit))
}

function bar(name, kind, value, most, unit) {
  const drawn = make('span', {className: 'bar'})
  // Not a style attribute, which the page's policy forbids.
  drawn.style.inlineSize = `${100 * value / most}%`
  return make('p', {className: `bar-line ${kind}`},
    make('span', {className: 'bar-name'}, name),
    make('span', {className: 'track', ariaHidden: 'true'}, drawn),
    make('span', {className: 'bar-value'}, unit(value)))
}

function ratio(one, other, less, more) {
  const factor = Math.max(one, other) / Math.min(one, other)
  if (!Number.isFinite(factor)) return one === other ? 'as many' : one < other ? `far ${less}` : `far ${more}`
  if (factor < 1.05) return `about as ${less === 'fewer' ? 'many' : 'soon'}`
  const shown = factor < 10 ? factor.toFixed(1) : Math.round(factor).toLocaleString('en')
  return `${shown} times ${one < other ? less : more}`
}

const milliseconds = value => value < 10 ? `${value.toFixed(1)} ms`
  : value < 10_000 ? `${Math.round(value).toLocaleString('en')} ms` : `${(value / 1000).toFixed(1)} s`

const TOKENS = {unit: value => plural(value, 'token'), less: 'fewer', more: 'more'}
const TIME = {unit: milliseconds, less: 'sooner', more: 'later'}
