// Pictures with names that are to become a pack.

import {find, make, say} from './dom.js'
import {mostPictures, readPicture, takeFiles} from './pictures.js'

const shown = []

export function startDemonstrations() {
  takeFiles(find('drop-demonstrations'), find('demonstration-files'), add)
  find('own-questions').addEventListener('change', showQuestions)
  find('wording').addEventListener('input', showQuestions)
  find('clear').addEventListener('click', () => {
    clear()
    find('demonstration-files').focus()
  })
}

/** Adds picture files, which get the names given, else wait for some. */
export async function add(files, names = []) {
  say(find('show-error'))
  const read = await Promise.allSettled(files.map(readPicture))
  const problems = read.filter(one => one.status === 'rejected').map(one => one.reason.message)
  const pictures = read.flatMap((one, place) => one.status === 'fulfilled' ? [[one.value, names[place]]] : [])
  const room = mostPictures() - shown.length
  if (pictures.length > room) {
    problems.push(`This server takes ${mostPictures()} pictures at a time: ${pictures.length - room} left out.`)
  }
  const added = pictures.slice(0, room).map(([picture, name = '']) => addOne(picture, name))
  if (problems.length) say(find('show-error'), problems.join(' '))
  refresh()
  added.find(one => !one.name.value)?.name.focus()
}

export function clear() {
  shown.splice(0).forEach(one => one.item.remove())
  say(find('show-error'))
  refresh()
}

/** What was shown as [{url, question, answer}]; null, and says so, where a name is missing. */
export function collect() {
  const nameless = shown.filter(one => !one.name.value.trim())
  shown.forEach(one => one.name.setAttribute('aria-invalid', nameless.includes(one)))
  if (nameless.length) {
    say(find('show-error'), 'Give every picture a name: it is the answer that the model is shown.')
    nameless[0].name.focus()
    return null
  }
  say(find('show-error'))
  return shown.map(one => ({
    url: one.picture.url,
    question: (find('own-questions').checked && one.question.value.trim()) || find('wording').value.trim(),
    answer: one.name.value.trim(),
  }))
}

function addOne(picture, name) {
  const one = {
    picture,
    name: make('input', {type: 'text', value: name, placeholder: 'Name', maxLength: 500, autocomplete: 'off',
      oninput: showNames}),
    question: make('input', {type: 'text', maxLength: 500, autocomplete: 'off', className: 'own'}),
    remove: make('button', {type: 'button', className: 'remove', onclick: () => drop(one)}, '\u00d7'),
  }
  // `list` is a property that cannot be written.
  one.name.setAttribute('list', 'names')
  one.image = make('img', {src: picture.url, title: picture.title})
  const frame = make('div', {className: 'frame'}, one.image)
  one.item = make('li', {}, frame, make('div', {className: 'words'}, one.name, one.question), one.remove)
  shown.push(one)
  find('demonstrations').append(one.item)
  return one
}

function drop(one) {
  const place = shown.indexOf(one)
  shown.splice(place, 1)
  one.item.remove()
  refresh()
  const next = shown[Math.min(place, shown.length - 1)]
  next ? next.remove.focus() : find('demonstration-files').focus()
}

function refresh() {
  shown.forEach((one, place) => {
    const which = `picture ${place + 1}`
    one.image.alt = `Demonstration, ${which}`
    one.name.setAttribute('aria-label', `Name of ${which}`)
    one.question.setAttribute('aria-label', `Question about ${which}`)
    one.remove.setAttribute('aria-label', `Remove ${which}`)
  })
  find('making').hidden = !shown.length
  find('start').hidden = shown.length > 0
  showNames()
  showQuestions()
}

function showNames() {
  const names = new Set(shown.map(one => one.name.value.trim()).filter(Boolean))
  find('names').replaceChildren(...[...names].map(value => make('option', {value})))
}

function showQuestions() {
  for (const one of shown) {
    one.question.hidden = !find('own-questions').checked
    one.question.placeholder = find('wording').value
  }
}
