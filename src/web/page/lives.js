// The connections: the latest or the longest-lived, by role, state and outcome; one of them can be chosen.

import { $, h, mark, say } from './draw.js';
import { OUTCOMES, STATES, age, clock, duration, words } from './words.js';

const SHOWN = 50;
const EVERY = 2000;

export class Lives {
  #rows = [];
  #lives = [];
  #active = null;
  #ahead = 0;
  #busy = false;
  #again = false;
  #timer = 0;
  #touched = false;

  /** `chosen(conn)` is told which one is chosen. */
  constructor(chosen) {
    this.chosen = chosen;
    const option = (value, text) => h('option', { value }, text ?? value);
    $('by-state').append(...STATES.map(([name]) => option(name)));
    $('by-outcome').append(option('open', 'open: not closed by us'), ...OUTCOMES.map((reason) => option(reason, words(reason))));
    for (const id of ['by-role', 'by-state', 'by-outcome', 'by-order']) $(id).addEventListener('change', () => this.refresh());
    $('lives').addEventListener('keydown', (event) => this.#key(event));
    $('lives').addEventListener('click', (event) => {
      const row = event.target.closest('[role=option]');
      if (row) this.#choose(row.dataset.conn);
    });
    document.addEventListener('visibilitychange', () => document.hidden || this.refresh());
  }

  /** Begins to ask; a process that follows no lives has none to show. */
  start() {
    this.stop();
    this.#timer = setInterval(() => document.hidden || $('hold').checked || this.refresh(), EVERY);
    this.refresh();
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = 0;
  }

  set ahead(seconds) {
    this.#ahead = seconds;
  }

  async refresh() {
    if (!this.#timer) return;
    if (this.#busy) {
      this.#again = true;
      return;
    }
    this.#busy = true;
    const query = new URLSearchParams({ limit: SHOWN, order: $('by-order').value });
    for (const name of ['role', 'state', 'outcome']) if ($(`by-${name}`).value) query.set(name, $(`by-${name}`).value);
    try {
      const answer = await fetch(`/api/connections?${query}`);
      if (answer.ok) this.#show(await answer.json());
      else say($('lives-note'), (await answer.text()).trim());
    } catch {
      say($('lives-note'), 'Nobody answers: this is what was seen last.');
    } finally {
      this.#busy = false;
      if (this.#again) {
        this.#again = false;
        this.refresh();
      }
    }
  }

  #show(lives) {
    this.#lives = lives;
    while (this.#rows.length < lives.length) {
      const cells = ['role', 'conn', 'state', 'way', 'time', 'outcome'].map((name) => h('span', { class: name }));
      const row = h('li', { role: 'option', id: `life-${this.#rows.length}` }, cells);
      this.#rows.push({ row, cells });
    }
    const shown = this.#rows.slice(0, lives.length);
    if ($('lives').children.length !== shown.length) $('lives').replaceChildren(...shown.map(({ row }) => row));
    lives.forEach((life, i) => this.#fill(shown[i], life));
    say($('lives-note'), lives.length === 0 ? 'None.' : lives.length === SHOWN ? `${SHOWN} are shown, there may be more.` : `${lives.length} shown.`);
    this.#markActive();
    this.#first();
  }

  /** So that there is a ladder to see: the first that has gone furthest, until somebody chooses. */
  #first() {
    if (this.#touched) return;
    const ends = this.#lives.filter((life) => life.peer && life.steps.length > 1);
    const first = ends.find((life) => life.role === 'client' && life.state === 'TIME_WAIT') ?? ends[0];
    if (first) this.#choose(first.conn);
  }

  #fill({ row, cells }, life) {
    const [role, conn, state, way, time, outcome] = cells;
    const now = Date.now() / 1000 + this.#ahead;
    const over = life.state === 'CLOSED';
    mark(row, 'data-conn', life.conn);
    mark(role, 'class', `role who ${life.role}`);
    say(role, life.role);
    say(conn, life.conn);
    say(state, life.state);
    mark(state, 'class', `state${over ? ' over' : ''}`);
    const listens = life.steps.some((step) => step.to === 'LISTEN');
    say(way, listens ? `listens on ${life.local}` : `${life.local} → ${life.peer}`);
    say(time, over ? `${clock(life.opened)}, lived ${duration(life.since - life.opened)}` : `${clock(life.opened)}, for ${age(now - life.opened)}`);
    say(outcome, life.reason ? words(life.reason) : life.followed ? 'open' : 'not followed');
  }

  #key(event) {
    const here = this.#lives.findIndex((life) => life.conn === this.#active);
    const to = { ArrowDown: here + 1, ArrowUp: Math.max(0, here - 1), Home: 0, End: this.#lives.length - 1, PageDown: here + 8, PageUp: Math.max(0, here - 8) }[event.key];
    if (event.key === 'Escape') this.#choose(null);
    else if (to !== undefined && this.#lives.length) this.#choose(this.#lives[Math.min(to, this.#lives.length - 1)].conn);
    else return;
    event.preventDefault();
  }

  #choose(conn) {
    this.#touched = true;
    this.#active = conn;
    this.#markActive();
    this.chosen(conn);
  }

  /** One that was chosen elsewhere. */
  choose(conn) {
    this.#choose(conn);
  }

  #markActive() {
    let active = null;
    this.#rows.slice(0, this.#lives.length).forEach(({ row }, i) => {
      const is = this.#lives[i].conn === this.#active;
      mark(row, 'aria-selected', String(is));
      if (is) active = row;
    });
    mark($('lives'), 'aria-activedescendant', active?.id ?? null);
    if (active && document.activeElement === $('lives')) {
      // Within the list only: the page stays where it is.
      const [top, bottom] = [active.offsetTop, active.offsetTop + active.offsetHeight];
      if (top < $('lives').scrollTop) $('lives').scrollTop = top;
      else if (bottom > $('lives').scrollTop + $('lives').clientHeight) $('lives').scrollTop = bottom - $('lives').clientHeight;
    }
  }
}
