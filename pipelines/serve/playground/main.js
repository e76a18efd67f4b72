// The playground: shows pictures with names to the server, asks about another one, in two ways, and compares.

import {Answer, compare, kept, user, writtenOut} from './answers.js'
import {call, forgetKey, keepKey, key, makePack, models, onKeyWanted} from './api.js'
import {add, clear, collect, startDemonstrations} from './demonstrations.js'
import {find, make, plural, say, whileBusy} from './dom.js'
import {inUse, refreshPacks, shortId, startPacks, use} from './packs.js'
import {keepPage, readLimits, readPicture, takeFiles} from './pictures.js'

const STYLES = ['noto', 'fxemoji', 'google-blob', 'fluent-flat']
const CLASSES = {turtle: 'bako', spider: 'mute'}
const ASKED_STYLE = 'fluent-3d'

const answers = {pack: new Answer(find('pack-answer')), full: new Answer(find('full-answer'))}
let query = null
let reading = Promise.resolve()
let running = null

start()

function start() {
  keepPage()
  onKeyWanted(askForKey)
  startDemonstrations()
  startPacks(showPackInUse)
  takeFiles(find('drop-query'), find('query-file'), ([file]) => file && setQuery(file))
  find('show').addEventListener('submit', event => {
    event.preventDefault()
    whileBusy(find('make'), makeThePack)
  })
  find('ask').addEventListener('submit', event => {
    event.preventDefault()
    ask()
  })
  find('stop').addEventListener('click', stop)
  find('examples').addEventListener('click', event => whileBusy(event.currentTarget, showExamples))
  find('forget-key').addEventListener('click', () => {
    forgetKey()
    showKeyState()
    location.reload()
  })
  find('wording').addEventListener('input', followWording)
  find('question').addEventListener('input', () => { find('question').dataset.own = 'yes' })
  document.addEventListener('keydown', event => { if (event.key === 'Escape') stop() })
  document.addEventListener('paste', paste)
  showPackInUse()
  showKeyState()
  load()
}

async function load() {
  try {
    find('limit').textContent = await readLimits()
    await fusingModel()
    await refreshPacks()
    showKeyState()
  } catch (error) {
    say(find('server-error'), error)
  }
}

// Models.

/** The model that is chosen, once the server has told which there are. */
async function fusingModel() {
  if (find('model').value) return find('model').value
  const all = await models()
  const fusing = all.filter(one => one.fuses)
  find('model').replaceChildren(...all.map(one => make('option',
    {value: one.id, disabled: !one.fuses}, one.fuses ? one.id : `${one.id} (makes no packs)`)))
  find('model').disabled = !fusing.length
  if (!fusing.length) throw new Error('No model of this server makes packs: give it an adapter that fuses.')
  find('model').value = fusing[0].id
  return find('model').value
}

// The key.

function askForKey(refused) {
  const [form, field, before] = [find('key'), find('key-field'), document.activeElement]
  find('key-why').textContent = (refused ? 'The server refuses this key: enter another one.'
    : 'This server answers only who has a key.') + ' It stays in this tab.'
  form.hidden = false
  field.value = ''
  field.focus()
  return new Promise(resolve => {
    const answer = given => event => {
      event?.preventDefault()
      form.onsubmit = find('key-cancel').onclick = null
      form.hidden = true
      if (given) keepKey(field.value.trim())
      field.value = ''
      showKeyState()
      before?.focus()
      resolve(given)
    }
    form.onsubmit = answer(true)
    find('key-cancel').onclick = answer(false)
  })
}

function showKeyState() {
  find('forget-key').hidden = !key()
}

// Demonstrations.

async function makeThePack() {
  const demonstrations = collect()
  if (!demonstrations) return
  find('made').replaceChildren()
  try {
    const sent = demonstrations.map(({url, question, answer}) => ({image_url: {url}, question, answer}))
    const pack = await makePack({model: await fusingModel(), demonstrations: sent})
    await use(pack, demonstrations)
    find('made').replaceChildren(madeOf(pack))
  } catch (error) {
    say(find('show-error'), error)
  }
}

function madeOf(pack) {
  return make('p', {className: 'made'}, 'Pack made: ', plural(pack.demonstrations, 'demonstration'),
    make('span', {className: 'tokens'}, make('s', {className: 'soft'}, pack.tokens_full.toLocaleString('en')),
      ' \u2192 ', make('strong', {}, plural(pack.tokens_fused, 'token'))))
}

async function showExamples() {
  try {
    const asked = await Promise.all(Object.keys(CLASSES).map(one => example(one, ASKED_STYLE)))
    const wanted = STYLES.flatMap(style => Object.keys(CLASSES).map(one => [one, style]))
    const files = await Promise.all(wanted.map(([one, style]) => example(one, style)))
    clear()
    await add(files, wanted.map(([one]) => CLASSES[one]))
    find('example-queries').replaceChildren(...asked.map(exampleButton))
    find('example-queries').hidden = false
    await setQuery(asked[0], false)
    find('make').focus()
  } catch (error) {
    say(find('show-error'), error)
  }
}

async function example(one, style) {
  const name = `${one}-${style}.webp`
  const answer = await call(`/playground/${name}`)
  return new File([await answer.blob()], name, {type: 'image/webp'})
}

function exampleButton(file) {
  const [what] = file.name.split('-')
  return make('button', {type: 'button', className: 'example', ariaLabel: `Ask about the ${what}`,
    onclick: () => setQuery(file)}, make('img', {src: `/playground/${file.name}`, alt: ''}))
}

function followWording() {
  if (!find('question').dataset.own) find('question').value = find('wording').value
}

// Asking.

// One after the other, so that the one chosen last is asked about.
function setQuery(file, focus = true) {
  reading = reading.then(() => showQuery(file, focus))
  return reading
}

async function showQuery(file, focus) {
  say(find('ask-error'))
  try {
    query = await readPicture(file)
  } catch (error) {
    say(find('ask-error'), error)
    return
  }
  const image = find('query')
  image.src = query.url
  image.alt = 'The picture to ask about'
  image.title = query.title
  image.hidden = false
  find('drop-query').classList.add('full')
  if (focus) find('question').focus()
}

function showPackInUse() {
  const used = inUse()
  find('asked-of').replaceChildren(...(used
    ? ['With pack ', make('code', {}, shortId(used.pack)), ` and ${used.pack.model}.`]
    : ['Make a pack first, or use one of the list.']))
}

async function ask() {
  await reading
  if (running) return
  const used = inUse()
  const missing = !used ? 'Make a pack first, or use one of the list.'
    : !query ? 'Choose a picture to ask about.' : null
  say(find('ask-error'), missing)
  if (missing) {
    (used ? find('query-file') : find('demonstration-files')).focus()
    return
  }
  running = new AbortController()
  showRunning()
  try {
    await askBoth(used, {url: query.url, question: find('question').value.trim()}, running.signal)
  } finally {
    running = null
    showRunning()
  }
}

async function askBoth({pack, demonstrations}, asked, signal) {
  const common = {model: pack.model, temperature: 0}
  find('comparison').hidden = true
  answers.full.wait(demonstrations ? 'Waits for its turn' : '')
  const short = await answers.pack.ask({...common, demo_pack: pack.id, messages: [user(asked)]}, signal)
  if (!demonstrations) {
    say(answers.full.error, 'The pictures of this pack are not on this page, so that they cannot be written '
      + 'out. Make the pack here to compare.')
    return
  }
  if (signal.aborted) {
    answers.full.wait('Stopped')
    return
  }
  const body = {...common, demonstrations: 'full', messages: writtenOut(demonstrations, asked)}
  const long = await answers.full.ask(body, signal)
  if (short && long) {
    find('comparison').hidden = false
    find('verdict').textContent = compare(find('bars'), short, long)
    find('kept').textContent = kept(long)
  }
}

function stop() {
  running?.abort()
  // Who stops does not want to find a key first.
  find('key-cancel').onclick?.()
}

function showRunning() {
  const hadFocus = [find('stop'), find('send')].includes(document.activeElement)
  find('stop').hidden = !running
  find('send').hidden = Boolean(running)
  if (hadFocus) (running ? find('stop') : find('send')).focus()
}

// A pasted picture is asked about where the focus is in the question's part, or a pack waits for a question.
function paste(event) {
  const files = [...event.clipboardData.files]
  if (!files.length) return
  event.preventDefault()
  const part = document.activeElement?.closest('section')
  const asks = part ? part.classList.contains('ask') : Boolean(inUse())
  asks ? setQuery(files[0]) : add(files)
}
