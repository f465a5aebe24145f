// Making elements of the page and of drawings. Text is only ever text: no markup is made from what comes over the network.

const SVG = 'http://www.w3.org/2000/svg';

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === false || value == null) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** An HTML element. */
export function h(tag, attributes, ...children) {
  return made(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes, ...children) {
  return made(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets text only where it differs: what did not change is not laid out anew, nor read out again. */
export function say(element, text) {
  const told = String(text);
  if (element.textContent !== told) element.textContent = told;
}

/** Sets an attribute only where it differs; null removes it. */
export function mark(element, name, value) {
  if (value == null || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Calls `drawn` with the width of `element`, now and whenever it changes. */
export function whenSized(element, drawn) {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== last) drawn((last = width));
  }).observe(element);
}

export const $ = (id) => document.getElementById(id);

/** Whether things may move. */
export const still = matchMedia('(prefers-reduced-motion: reduce)');
