// Packs that the server keeps: which one is asked with, and those that were made from pictures of this page.

import {deletePack, exportPack, importPack, packs as listPacks} from './api.js'
import {find, make, plural, say, whileBusy} from './dom.js'

// What each pack of this page was made of; the server keeps fused tokens and no pictures.
const shownIn = new Map()
let known = []
let used = null
let changed = () => {}

/** `onChange()` is called when another pack is used, or none. */
export function startPacks(onChange) {
  changed = onChange
  find('import').addEventListener('change', event => {
    const [file] = event.target.files
    if (file) attempt(event.target, async () => use(await importPack(file)))
    event.target.value = ''
  })
}

/** {pack, demonstrations}: what is asked with. Demonstrations are null where their pictures are not here. */
export const inUse = () => used && {pack: used, demonstrations: shownIn.get(used.id) ?? null}

export async function refreshPacks() {
  known = await listPacks()
  if (used && !known.some(one => one.id === used.id)) {
    used = null
    changed()
  }
  draw()
}

/** Ask with `pack` from here on. */
export async function use(pack, demonstrations = null) {
  if (demonstrations) shownIn.set(pack.id, demonstrations)
  used = pack
  changed()
  await refreshPacks()
}

export const shortId = pack => pack.id.length > 14 ? `${pack.id.slice(0, 14)}\u2026` : pack.id

function draw() {
  const focused = document.activeElement?.dataset?.focus
  find('packs').replaceChildren(...known.map(line))
  find('no-packs').hidden = known.length > 0
  if (focused) [...find('packs').querySelectorAll('button')].find(one => one.dataset.focus === focused)?.focus()
}

function line(pack) {
  const name = shortId(pack)
  const isUsed = used?.id === pack.id
  const item = make('li', {className: isUsed ? 'used' : ''})
  const button = (label, kind, work) => {
    const made = make('button', {type: 'button', onclick: () => attempt(made, work), ariaLabel: `${label} ${name}`},
      label)
    made.dataset.focus = `${kind} ${pack.id}`
    return made
  }
  const choose = button(isUsed ? 'In use' : 'Use', 'use', () => use(pack))
  choose.ariaPressed = String(isUsed)
  item.append(
    make('div', {className: 'about'},
      make('code', {title: pack.id}, name),
      make('span', {className: 'soft small'}, facts(pack)), pictures(pack)),
    make('div', {className: 'line'}, choose, button('Export', 'export', () => download(pack)), remover(pack, name)))
  return item
}

/** Asks once more before the pack is gone for everybody who uses it. */
function remover(pack, name) {
  const made = make('button', {type: 'button', className: 'danger', ariaLabel: `Delete ${name}`}, 'Delete')
  const label = (text, sure) => {
    made.textContent = text
    made.ariaLabel = `${text} ${name}`
    made.dataset.sure = sure
  }
  made.addEventListener('blur', () => label('Delete', ''))
  made.addEventListener('click', () => {
    if (!made.dataset.sure) return label('Really delete', 'yes')
    return attempt(made, async () => {
      await deletePack(pack.id)
      shownIn.delete(pack.id)
      await refreshPacks()
      find('packs').querySelector('button') ? find('packs').querySelector('button').focus() : find('import').focus()
    })
  })
  return made
}

function facts(pack) {
  const when = pack.created && new Date(1000 * pack.created)
    .toLocaleString('en', {dateStyle: 'medium', timeStyle: 'short'})
  return [pack.model, plural(pack.demonstrations, 'demonstration'),
    `${pack.tokens_full.toLocaleString('en')} \u2192 ${plural(pack.tokens_fused, 'token')}`, when]
    .filter(Boolean).join(' \u00b7 ')
}

function pictures(pack) {
  const shown = shownIn.get(pack.id) ?? []
  return make('span', {className: 'thumbs'},
    ...shown.slice(0, 8).map(one => make('img', {src: one.url, alt: '', title: one.answer})))
}

async function download(pack) {
  const url = URL.createObjectURL(await exportPack(pack.id))
  const link = make('a', {href: url, download: `${pack.id}.safetensors`})
  document.body.append(link)
  link.click()
  link.remove()
  setTimeout(() => URL.revokeObjectURL(url), 60_000)
}

function attempt(button, work) {
  say(find('packs-error'))
  return whileBusy(button, async () => {
    try {
      await work()
    } catch (error) {
      say(find('packs-error'), error)
    }
  })
}
