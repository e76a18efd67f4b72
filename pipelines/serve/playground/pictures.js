// Pictures as they come: dropped, pasted or chosen. They are sent as they are.

import {call} from './api.js'
import {plural, size} from './dom.js'

const KINDS = ['image/jpeg', 'image/png', 'image/webp', 'image/gif', 'image/bmp']
const limits = {max_images: 64, max_image_bytes: 4 * 2 ** 20, max_image_pixels: 16_000_000}

/** What this server takes, in words. */
export async function readLimits() {
  Object.assign(limits, await (await call('/playground/limits.json')).json())
  return `JPEG, PNG, WebP, GIF or BMP; up to ${size(limits.max_image_bytes)} each and `
    + `${plural(limits.max_images, 'picture')} at a time. They are sent as they are.`
}

export const mostPictures = () => limits.max_images
export const accepted = KINDS.join(',')

/** {url: a data URI, title: the file's name}, or an Error that says why not. */
export async function readPicture(file) {
  if (!KINDS.includes(file.type)) {
    throw new Error(`${file.name} is not a picture of a kind that is read: use JPEG, PNG, WebP, GIF or BMP.`)
  }
  if (file.size > limits.max_image_bytes) {
    throw new Error(`${file.name} has ${size(file.size)}; this server takes pictures of up to `
      + `${size(limits.max_image_bytes)}. Make it smaller.`)
  }
  const url = await dataUrl(file)
  const pixels = await decoded(url, file.name)
  if (pixels > limits.max_image_pixels) {
    throw new Error(`${file.name} has ${pixels.toLocaleString('en')} pixels; this server takes up to `
      + `${limits.max_image_pixels.toLocaleString('en')}. Make it smaller.`)
  }
  return {url, title: file.name}
}

/** Calls `take(files)` with what is dropped on `zone` or chosen in `input`. */
export function takeFiles(zone, input, take) {
  input.accept = accepted
  input.addEventListener('change', () => {
    take([...input.files])
    // So that the same file can be chosen again.
    input.value = ''
  })
  let inside = 0
  const mark = change => {
    inside = Math.max(0, inside + change)
    zone.classList.toggle('over', inside > 0)
  }
  zone.addEventListener('dragenter', () => mark(1))
  zone.addEventListener('dragleave', () => mark(-1))
  zone.addEventListener('drop', event => {
    mark(-inside)
    take([...event.dataTransfer.files])
  })
}

/** Files that are dropped beside the zones are not opened in place of the page. */
export function keepPage() {
  for (const name of ['dragover', 'drop']) {
    window.addEventListener(name, event => event.preventDefault())
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader()
    reader.addEventListener('load', () => resolve(reader.result))
    reader.addEventListener('error', () => reject(new Error(`${file.name} cannot be read.`)))
    reader.readAsDataURL(file)
  })
}

function decoded(url, name) {
  return new Promise((resolve, reject) => {
    const image = new Image()
    image.addEventListener('load', () => resolve(image.naturalWidth * image.naturalHeight))
    image.addEventListener('error', () => reject(new Error(`${name} is damaged, or no picture at all.`)))
    image.src = url
  })
}
