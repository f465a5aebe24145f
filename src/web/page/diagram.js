// The state diagram: how many are in each state, and which arrows are walked.

import { $, mark, s, say, still, whenSized } from './draw.js';
import { ARROWS, NODES, SUDDEN, curve, grid, place, straight, stub } from './shape.js';
import { LABEL, age, count, short } from './words.js';
import { sum } from './sockets.js';

const ROLES = ['client', 'server'];
// Told apart without colour too.
const MARKS = ['●', '■'];

// A rate is what came in about so many seconds.
const MEMORY = 2.5;
const DOTS = 24;
const WAY = 700;

export class Diagram {
  #svg = $('diagram');
  #nodes = new Map();
  #arrows = new Map();
  #dots = [];
  #moving = new Set();
  #last = performance.now();
  #services = [];
  #grid = null;

  /** `look(state, chosen)` is told which state is looked at; null: none. */
  constructor(look) {
    this.look = look;
    const heads = ['base', ...ROLES].map((kind) =>
      s('marker', { id: `head-${kind}`, class: `head ${kind}`, viewBox: '0 0 10 10', refX: 8.5, refY: 5, markerWidth: kind === 'base' ? 9 : 14, markerHeight: kind === 'base' ? 9 : 14, markerUnits: 'userSpaceOnUse', orient: 'auto' }, s('path', { d: 'M0 1L9 5L0 9z' })));
    this.#svg.append(s('defs', {}, heads));
    this.arrowLayer = s('g', { class: 'arrows', 'aria-hidden': 'true' });
    this.dotLayer = s('g', { class: 'dots', 'aria-hidden': 'true' });
    this.nodeLayer = s('g', { class: 'nodes' });
    this.#svg.append(this.arrowLayer, this.dotLayer, this.nodeLayer);
    for (const [from, to, out, along, into, end, words, where, below, path] of ARROWS) {
      this.#arrow(`${from} ${to === 'END' ? 'CLOSED' : to}`, { from, to, out, along, into, end, words, where, below, path });
    }
    for (const [from, side, along] of SUDDEN) this.#arrow(`${from} CLOSED`, { from, side, along, sudden: true });
    NODES.forEach((node) => this.#node(node));
    for (let i = 0; i < DOTS; i++) {
      const circle = s('circle', { r: 5, class: 'dot', visibility: 'hidden' });
      this.dotLayer.append(circle);
      this.#dots.push({ circle, busy: false });
    }
    whenSized(this.#svg.parentElement, (width) => this.#lay(width));
    setInterval(() => this.#cool(), 200);
  }

  #node(node) {
    const box = s('rect', { rx: 9, class: 'box' });
    const name = s('text', { class: 'name' }, node.state);
    const counts = ROLES.map((role) => s('text', { class: `count ${role}` }));
    const oldest = s('text', { class: 'oldest' });
    // The counts are in its label, in words: as text beside them they would be read twice.
    const hit = s('g', { class: 'hit' }, box, name);
    const g = s('g', { class: 'node', 'data-state': node.state }, hit, s('g', { 'aria-hidden': 'true' }, counts, oldest));
    const end = node.id === 'END';
    if (end) say(oldest, 'the end');
    if (end) {
      // The same state once more: one of the two is enough for who does not see where it stands.
      mark(g, 'aria-hidden', 'true');
    } else {
      for (const [key, value] of Object.entries({ tabindex: 0, role: 'button', 'aria-pressed': 'false', 'aria-label': node.state })) mark(hit, key, value);
      hit.addEventListener('focus', () => this.look(node.state, false));
      hit.addEventListener('blur', () => this.look(null, false));
    }
    g.addEventListener('pointerenter', () => this.look(node.state, false));
    g.addEventListener('pointerleave', () => this.look(null, false));
    g.addEventListener('click', () => this.look(node.state, true));
    hit.addEventListener('keydown', (event) => this.#key(event, node));
    this.nodeLayer.append(g);
    this.#nodes.set(node.id, { ...node, g, hit, box, name, counts, oldest, n: 0 });
  }

  #arrow(key, arrow) {
    const base = s('path', { class: `base${arrow.path ? ` ${arrow.path}` : ''}`, 'marker-end': 'url(#head-base)' });
    const roles = ROLES.map((role) => s('path', { class: `walk ${role}`, 'marker-end': `url(#head-${role})`, visibility: 'hidden' }));
    const words = (arrow.words ?? (arrow.sudden ? ['✕'] : [])).map((word) => s('text', { class: arrow.sudden ? 'end' : 'words' }, word));
    const g = s('g', { class: `arrow${arrow.sudden ? ' sudden' : ''}${arrow.unknown ? ' unknown' : ''}`, 'data-arrow': key }, base, roles, words);
    this.arrowLayer.append(g);
    const made = { ...arrow, key, g, base, roles, text: words, rates: [0, 0], seen: [0, 0] };
    this.#arrows.set(key, made);
    return made;
  }

  /** From state to state with the arrow keys: to the nearest in that direction. */
  #key(event, node) {
    const [dx, dy] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key] ?? [0, 0];
    if (event.key === 'Enter' || event.key === ' ') this.look(node.state, true);
    else if (event.key === 'Escape') this.look(null, true);
    else if (dx || dy) {
      const ahead = NODES.filter((other) => other.id !== 'END' && (other.column - node.column) * dx + (other.row - node.row) * dy > 0);
      const far = (other) => Math.hypot((other.column - node.column) * (dx ? 1 : 2.2), (other.row - node.row) * (dy ? 1 : 2.2));
      const next = ahead.sort((a, b) => far(a) - far(b))[0];
      if (next) this.#nodes.get(next.id).hit.focus();
    } else return;
    event.preventDefault();
  }

  /** What each state means, for who hears the diagram; its age would be read out each second, and is in the facts. */
  describe(meanings) {
    for (const node of this.#nodes.values()) if (node.id !== 'END') mark(node.hit, 'aria-description', meanings.get(node.state));
  }

  /** Marks the state that is looked at for good. */
  choose(state) {
    for (const node of this.#nodes.values()) {
      if (node.id !== 'END') mark(node.hit, 'aria-pressed', String(node.state === state));
      node.g.classList.toggle('chosen', node.state === state);
    }
  }

  #lay(width) {
    const em = parseFloat(getComputedStyle(this.#svg).fontSize);
    this.#grid = grid(width, em);
    mark(this.#svg, 'viewBox', `0 0 ${width} ${this.#grid.height}`);
    mark(this.#svg, 'width', width);
    mark(this.#svg, 'height', this.#grid.height);
    for (const dot of this.#dots) mark(dot.circle, 'r', em * 0.36);
    for (const node of this.#nodes.values()) this.#draw(node);
    for (const arrow of this.#arrows.values()) this.#route(arrow);
  }

  #draw(node) {
    if (!this.#grid) return;
    const { em } = this.#grid;
    const { x, y, w, h } = (node.at = place(this.#grid, node, node.n));
    for (const [name, value] of Object.entries({ x: x - w, y: y - h, width: 2 * w, height: 2 * h })) mark(node.box, name, value.toFixed(1));
    const texts = [[node.name, x, y - h + em * (node.id === 'END' ? 1.9 : 1.3)], [node.counts[0], x - w * 0.45, y - h + em * 2.45], [node.counts[1], x + w * 0.45, y - h + em * 2.45], [node.oldest, x, y - h + em * (node.id === 'END' ? 3 : 3.45)]];
    for (const [text, tx, ty] of texts) {
      mark(text, 'x', tx.toFixed(1));
      mark(text, 'y', ty.toFixed(1));
    }
  }

  #route(arrow) {
    if (!this.#grid) return;
    const [from, to] = [this.#nodes.get(arrow.from)?.at, this.#nodes.get(arrow.to)?.at];
    const { em, roomy } = this.#grid;
    if (arrow.sudden) {
      arrow.line = stub(this.#grid, from, arrow.side, arrow.along);
      const [x, y] = arrow.line.end;
      mark(arrow.text[0], 'x', x);
      mark(arrow.text[0], 'y', y + em * 0.3);
    } else {
      arrow.line = arrow.unknown ? straight(from, to) : curve(from, arrow.out, arrow.along, to, arrow.into, arrow.end);
      arrow.text.forEach((text, i) => {
        const [place, side] = arrow.where;
        const [x, y] = arrow.line.point({ b: 0, m: 0.5, e: 1 }[place]);
        mark(text, 'x', x + { l: -0.6, r: 0.6, o: 0 }[side] * em);
        mark(text, 'y', y + (0.3 + arrow.below + (i - (arrow.text.length - 1) / 2) * 1.05) * em);
        mark(text, 'text-anchor', { l: 'end', r: 'start', o: 'middle' }[side]);
        mark(text, 'visibility', roomy ? null : 'hidden');
      });
    }
    for (const path of [arrow.base, ...arrow.roles]) mark(path, 'd', arrow.line.d);
  }

  /** A census: how many are where. */
  show(services, findings) {
    this.#services = services;
    for (const node of this.#nodes.values()) {
      const sums = ROLES.map((role) => sum(services, role, LABEL[node.state]));
      const n = sums[0].n + sums[1].n;
      if (node.id === 'END') continue;
      sums.forEach(({ n: of }, i) => {
        say(node.counts[i], `${MARKS[i]} ${short(of, !this.#grid?.roomy)}`);
        node.counts[i].classList.toggle('none', of === 0);
      });
      const old = sums.filter(({ oldest }) => oldest !== null).sort((a, b) => b.oldest - a.oldest)[0];
      const told = old && node.state !== 'LISTEN' ? `${old.atLeast ? '≥ ' : ''}${age(old.oldest)}` : '';
      say(node.oldest, told);
      const bad = findings.filter((finding) => finding.state === node.state);
      node.g.classList.toggle('warn', bad.length > 0);
      node.g.classList.toggle('bad', bad.some((finding) => finding.bad));
      node.g.classList.toggle('held', n > 0);
      mark(node.hit, 'aria-label', `${node.state}: ${ROLES.map((role, i) => `${count(sums[i].n)} ${role}`).join(', ')}${bad.length ? '; warning' : ''}`);
      if (n !== node.n) {
        node.n = n;
        this.#draw(node);
        for (const arrow of this.#arrows.values()) if (arrow.from === node.id || arrow.to === node.id) this.#route(arrow);
      }
    }
  }

  /** Who is not looked at has no numbers: the table cannot be read. */
  unknown() {
    for (const node of this.#nodes.values()) {
      if (node.id === 'END') continue;
      node.counts.forEach((text, i) => say(text, `${MARKS[i]} ?`));
      say(node.oldest, '');
      mark(node.hit, 'aria-label', `${node.state}: not known`);
    }
  }

  /** A batch of walks: role, from, to, evidence, how often. */
  walk(walks) {
    for (const [role, from, to, evidence, times] of walks) {
      const which = ROLES.indexOf(role);
      const arrow = this.#arrows.get(`${from} ${to}`) ?? this.#another(from, to);
      if (!arrow || which < 0) continue;
      arrow.rates[which] += times / MEMORY;
      this.#send(arrow, which, evidence === 'inferred');
    }
    this.#paint();
  }

  /** How often each way was walked so far. */
  walked(totals) {
    for (const arrow of this.#arrows.values()) arrow.seen = [0, 0];
    for (const [role, from, to, , times] of totals) {
      const arrow = this.#arrows.get(`${from} ${to}`);
      if (arrow) arrow.seen[ROLES.indexOf(role)] += times;
    }
    for (const arrow of this.#arrows.values()) arrow.g.classList.toggle('walked', arrow.seen.some((n) => n > 0));
  }

  /** A way that is no arrow: both states were seen, what lies between was not. */
  #another(from, to) {
    if (!this.#nodes.has(from) || !this.#nodes.has(to)) return null;
    const arrow = this.#arrow(`${from} ${to}`, { from, to: to === 'CLOSED' ? 'END' : to, unknown: true });
    this.#route(arrow);
    return arrow;
  }

  #send(arrow, which, inferred) {
    if (still.matches || document.hidden || !arrow.line) return;
    const dot = this.#dots.find((dot) => !dot.busy);
    if (!dot) return;
    dot.busy = true;
    mark(dot.circle, 'class', `dot ${ROLES[which]}${inferred ? ' inferred' : ''}`);
    this.#moving.add({ dot, arrow, began: performance.now() });
    if (this.#moving.size === 1) requestAnimationFrame((now) => this.#move(now));
  }

  #move(now) {
    for (const run of this.#moving) {
      const t = Math.min(1, Math.max(0, (now - run.began) / WAY));
      const [x, y] = run.arrow.line.point(t);
      mark(run.dot.circle, 'cx', x.toFixed(1));
      mark(run.dot.circle, 'cy', y.toFixed(1));
      mark(run.dot.circle, 'visibility', t < 1 ? 'visible' : 'hidden');
      if (t < 1) continue;
      run.dot.busy = false;
      this.#moving.delete(run);
    }
    if (this.#moving.size) requestAnimationFrame((next) => this.#move(next));
  }

  /** What was walked is forgotten little by little. */
  #cool() {
    const now = performance.now();
    const left = Math.exp((this.#last - now) / 1000 / MEMORY);
    this.#last = now;
    for (const arrow of this.#arrows.values()) arrow.rates = arrow.rates.map((rate) => (rate < 0.01 ? 0 : rate * left));
    this.#paint();
  }

  #paint() {
    // The head is to be seen.
    const widest = Math.min(8, (this.#grid?.em ?? 16) * 0.6);
    for (const arrow of this.#arrows.values()) {
      const widths = arrow.rates.map((rate) => (rate > 0.01 ? Math.min(widest, 1.6 + 1.1 * Math.log2(1 + rate)) : 0));
      arrow.roles.forEach((path, i) => {
        mark(path, 'visibility', widths[i] ? 'visible' : 'hidden');
        if (!widths[i]) return;
        mark(path, 'stroke-width', widths[i].toFixed(1));
        mark(path, 'stroke-opacity', Math.min(1, 0.15 + arrow.rates[i] * 3).toFixed(2));
        // Side by side where both ends walk the same arrow.
        const aside = widths[1 - i] ? (i ? -1 : 1) * (widths[1 - i] / 2 + 0.8) : 0;
        const [x, y] = arrow.line?.normal ?? [0, 0];
        mark(path, 'transform', aside ? `translate(${(x * aside).toFixed(1)} ${(y * aside).toFixed(1)})` : null);
      });
      if (widths[0] || widths[1]) arrow.g.classList.add('walked');
    }
  }
}
