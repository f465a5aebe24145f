// Where nobody's lives are followed: the services, and the sockets that have been in a state for longest.

import { $, h, mark, say } from './draw.js';
import { STATES, age, count } from './words.js';

const EVERY = 5000;
const ROWS = 100;

/** The services of a census as a table; choosing one shows its sockets only. */
export class Services {
  #rows = new Map();

  constructor(chosen) {
    this.chosen = chosen;
  }

  show(services, chosen) {
    const held = ({ role, sockets }) => role === 'server' || Object.values(sockets).some((n) => n > 0);
    const shown = services.filter(held).slice(0, ROWS);
    say($('services-note'), services.filter(held).length > ROWS ? `The first ${ROWS} are shown.` : '');
    const keys = new Set(shown.map(({ key }) => key));
    for (const [key, { row }] of this.#rows) {
      if (keys.has(key)) continue;
      row.remove();
      this.#rows.delete(key);
    }
    shown.forEach((service, i) => {
      const { row, button, cells } = this.#rows.get(service.key) ?? this.#row(service.key);
      if ($('services').children[i] !== row) $('services').insertBefore(row, $('services').children[i] ?? null);
      say(button, service.name);
      mark(button, 'aria-pressed', String(service.key === chosen));
      const { sockets, oldest_seconds: oldest, at_least: least, accept_queue: queue } = service;
      const old = oldest.close_wait ? `, ${least?.includes('close_wait') ? '≥ ' : ''}${age(oldest.close_wait)}` : '';
      const told = [
        service.role === 'server' ? 'in' : 'out', count(sockets.established), `${count(sockets.close_wait)}${sockets.close_wait ? old : ''}`,
        count(sockets.time_wait), queue ? `${count(queue.length)} of ${queue.limit ?? '?'}` : '–',
        service.opened === undefined ? '–' : count(service.opened), service.closed === undefined ? '–' : count(service.closed),
      ];
      cells.forEach((cell, n) => say(cell, told[n]));
    });
  }

  #row(key) {
    const button = h('button', { type: 'button', class: 'link', onclick: () => this.chosen(key) });
    const cells = Array.from({ length: 7 }, () => h('td', {}));
    const row = h('tr', {}, h('th', { scope: 'row' }, button), cells);
    const made = { row, button, cells };
    this.#rows.set(key, made);
    return made;
  }
}

/** Those that have been in a state for longest, with their owners where these may be known. */
export class Holders {
  #timer = 0;

  constructor() {
    $('held-state').append(...STATES.filter(([name]) => name !== 'CLOSED' && name !== 'LISTEN').map(([name]) => h('option', { value: name, selected: name === 'CLOSE_WAIT' }, name)));
    $('held-state').addEventListener('change', () => this.refresh());
  }

  start() {
    if (this.#timer) return;
    this.#timer = setInterval(() => document.hidden || this.refresh(), EVERY);
    this.refresh();
  }

  async refresh() {
    try {
      const answer = await fetch(`/api/sockets?state=${$('held-state').value}`);
      if (!answer.ok) return say($('held-note'), (await answer.text()).trim());
      const sockets = await answer.json();
      say($('held-note'), sockets.length ? '' : 'None.');
      $('held').replaceChildren(...sockets.map((socket) => h('li', {},
        h('span', { class: `role who ${socket.role}` }, socket.role),
        h('span', { class: 'way' }, `${socket.local} → ${socket.peer}`),
        h('span', { class: 'time' }, `${socket.at_least ? '≥ ' : ''}${age(socket.age_seconds)}`),
        h('span', { class: 'outcome' }, socket.process ? `${socket.process.name}, PID ${socket.process.pid}, descriptor ${socket.fd}` : ''))));
    } catch {
      say($('held-note'), 'Nobody answers: this is what was seen last.');
    }
  }
}
