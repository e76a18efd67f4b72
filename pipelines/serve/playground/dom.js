// Elements. Text is always text: nothing on this page is read as markup.

export const find = id => document.getElementById(id)

/** An element with properties, listeners (`onclick`), attributes and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value)
    else if (name in element) element[name] = value
    else element.setAttribute(name, value)
  }
  element.append(...children)
  return element
}

/** Says what went wrong in `place`, or nothing any more. */
export function say(place, error) {
  place.hidden = !error
  place.textContent = error ? error.message ?? String(error) : ''
}

/** `busy` while `work` runs: a second press of the button changes nothing. */
export async function whileBusy(button, work) {
  if (button.getAttribute('aria-busy') === 'true') return
  button.setAttribute('aria-busy', 'true')
  try {
    await work()
  } finally {
    button.removeAttribute('aria-busy')
  }
}

export const plural = (count, one) => `${count.toLocaleString('en')} ${one}${count === 1 ? '' : 's'}`

/** Bytes as people say them. */
export function size(bytes) {
  const mebibytes = bytes / 2 ** 20
  return mebibytes < 1 ? `${Math.ceil(bytes / 1024)} KiB` : `${Number(mebibytes.toFixed(1))} MiB`
}
