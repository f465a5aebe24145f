// Five minutes of three states. A second without a reading is a gap, not a zero.

import { $, h, mark, s, say, whenSized } from './draw.js';
import { LABEL, count, short } from './words.js';
import { sum } from './sockets.js';

const SECONDS = 300;
const SHOWN = ['ESTABLISHED', 'CLOSE_WAIT', 'TIME_WAIT'];
const ROLES = ['client', 'server'];
const HEIGHT = 104;
// A large table is counted less often than each second: every five at most.
const SELDOM = 6.5;

export class Charts {
  // When, and for each state both roles' counts; null where nobody knows.
  #points = [];
  #charts = [];

  constructor() {
    for (const state of SHOWN) {
      const lines = ROLES.map((role) => s('path', { class: `line ${role}` }));
      const [most, zero] = [s('text', { class: 'axis', x: 2, y: 12 }), s('line', { class: 'zero', x1: 0, y1: HEIGHT - 14, y2: HEIGHT - 14 })];
      const ends = [s('text', { class: 'axis', x: 2, y: HEIGHT - 2 }, '5 minutes ago'), s('text', { class: 'axis now', y: HEIGHT - 2 }, 'now')];
      const svg = s('svg', { class: 'chart', role: 'img', height: HEIGHT }, zero, lines, most, ends);
      const now = ROLES.map((role) => h('span', { class: `who ${role}` }));
      const figure = h('figure', {}, h('figcaption', {}, h('b', {}, state), now), svg);
      $('charts').append(figure);
      this.#charts.push({ state, lines, most, zero, svg, now, width: 0 });
      const chart = this.#charts.at(-1);
      whenSized(figure, (width) => {
        chart.width = width;
        mark(svg, 'width', width);
        mark(svg, 'viewBox', `0 0 ${width} ${HEIGHT}`);
        mark(zero, 'x2', width);
        mark(ends[1], 'x', width - 2);
        this.#draw(chart);
      });
    }
  }

  add(at, services) {
    const counts = services && SHOWN.map((state) => ROLES.map((role) => sum(services, role, LABEL[state]).n));
    const last = this.#points.at(-1);
    // A clock that was set back begins anew.
    if (last && at <= last.at) this.#points = [];
    if (last && at - last.at > SELDOM) this.#points.push({ at: last.at + 1, counts: null });
    this.#points.push({ at, counts });
    const old = this.#points.findIndex((point) => point.at > at - SECONDS);
    this.#points.splice(0, old < 0 ? this.#points.length : old);
    this.#charts.forEach((chart) => this.#draw(chart));
  }

  /** Nobody counts any more. */
  gap() {
    const last = this.#points.at(-1);
    if (last?.counts) this.#points.push({ at: last.at + 0.001, counts: null });
  }

  /** Other services are looked at, or another process: what was before is of something else. */
  clear() {
    this.#points = [];
    this.#charts.forEach((chart) => this.#draw(chart));
  }

  #draw({ state, lines, most, svg, now, width }) {
    if (!width) return;
    const which = SHOWN.indexOf(state);
    const last = this.#points.at(-1);
    const top = Math.max(1, ...this.#points.flatMap((point) => point.counts?.[which] ?? []));
    const x = (at) => (width - 3) * (1 - (last.at - at) / SECONDS);
    const y = (n) => HEIGHT - 15 - (n / top) * (HEIGHT - 33);
    ROLES.forEach((role, r) => {
      let [path, pen] = ['', false];
      for (const { at, counts } of this.#points) {
        if (counts) path += `${pen ? 'L' : 'M'}${x(at).toFixed(1)} ${y(counts[which][r]).toFixed(1)}`;
        pen = Boolean(counts);
      }
      mark(lines[r], 'd', path || 'M0 0');
      const n = last?.counts?.[which][r];
      say(now[r], n === undefined ? '–' : `${role} ${count(n)}`);
    });
    say(most, short(top));
    const told = ROLES.map((role, r) => `${role} ${last?.counts ? last.counts[which][r] : 'unknown'}`).join(', ');
    mark(svg, 'aria-label', `${state} over the last ${Math.round(this.#points.length ? last.at - this.#points[0].at : 0)} seconds: now ${told}; at most ${top}`);
  }
}
