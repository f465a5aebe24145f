// The ladder of one connection: both ends as lines, their states, and the segments that follow from them.

import { $, h, s, say, whenSized } from './draw.js';
import { badge } from './facts.js';
import { observed, rows, segments, states } from './segments.js';
import { EVIDENCE, clock, duration, words } from './words.js';

// TCP_TIMEWAIT_LEN.
const TIME_WAIT = 60;
const SIDES = ['client', 'server'];

export class Ladder {
  #lives = null;
  #conn = null;
  #width = 0;
  #gone = false;
  #ahead = 0;
  #timer = 0;
  #busy = false;

  constructor() {
    whenSized($('ladder-drawing'), (width) => {
      this.#width = width;
      this.#draw();
    });
    setInterval(() => this.#tick(), 500);
  }

  /** What the other side's clock is ahead of ours. */
  set ahead(seconds) {
    this.#ahead = seconds;
  }

  get chosen() {
    return this.#conn;
  }

  /** Draws this connection, and goes on as it does. */
  choose(conn) {
    this.#conn = conn;
    this.#lives = null;
    this.#gone = false;
    $('ladder').hidden = !conn;
    $('ladder-none').hidden = Boolean(conn);
    if (conn) this.refresh();
  }

  /** Whether a line of the log is of what is drawn. */
  concerns(conn) {
    return this.#lives?.some((life) => life.conn === conn) ?? conn === this.#conn;
  }

  async refresh() {
    const conn = this.#conn;
    if (!conn || this.#busy) return;
    this.#busy = true;
    try {
      const answer = await fetch(`/api/connections?conn=${conn}`);
      const lives = answer.ok ? await answer.json() : null;
      if (conn !== this.#conn || !lives) return;
      this.#gone = lives.length === 0;
      // What was seen stays, though nobody keeps it any more.
      if (lives.length || !this.#lives) this.#lives = lives;
      this.#draw();
    } catch { /* The page says that nobody answers. */ } finally {
      this.#busy = false;
      if (conn !== this.#conn) this.refresh();
    }
  }

  #over() {
    return this.#gone || (this.#lives?.every((life) => life.state === 'CLOSED' || !life.followed) ?? false);
  }

  #tick() {
    if (!this.#conn || document.hidden) return;
    if (!this.#over() && ++this.#timer % 2 === 0) this.refresh();
    this.#clock();
  }

  #clock() {
    const waits = this.#lives?.find((life) => life.state === 'TIME_WAIT' && life.followed && life.steps.length);
    $('time-wait').hidden = !waits || this.#gone;
    if (!waits || this.#gone) return;
    const left = TIME_WAIT - (Date.now() / 1000 + this.#ahead - waits.since);
    $('time-wait-bar').value = Math.max(0, left);
    say($('time-wait-left'), left > 0
      ? `TIME_WAIT of the ${waits.role}: ${Math.ceil(left)} of ${TIME_WAIT} s left, if the peer does not repeat its FIN`
      : `TIME_WAIT of the ${waits.role}: its ${TIME_WAIT} s are over; the kernel’s timer is coarse, it may take 2 s more`);
  }

  #draw() {
    if (!this.#lives || !this.#width) return;
    const lives = SIDES.map((role) => this.#lives.find((life) => life.role === role) ?? null);
    const ends = lives.map((life) => (life ? states(life) : null));
    const notes = [];
    if (this.#gone) notes.push(this.#lives.length ? 'No longer kept by the process: this is what was seen last.' : 'Not known, or no longer kept.');
    this.#lives.filter((life) => !life.followed).forEach((life) => notes.push(`The ${life.role} end is no longer followed: what became of it is not known.`));
    if (this.#lives.some((life) => life.local === life.peer)) notes.push('It is connected to itself: the other end is this one.');
    else if (lives.some((life) => !life) && this.#lives.length) notes.push('One end only is seen from here: the other is grey, and nothing is said of its states.');
    if (ends[0] && ends[1] && segments(ends).some(({ sent, got }) => sent >= 0 && got < 0)) notes.push('An arrow that ends half-way: the other end shows no sign of that segment.');
    say($('ladder-notes'), notes.join(' '));
    const told = lives.filter(Boolean).map((life) => `${life.role} ${life.local}, ${life.state}`).join('; ');
    say($('ladder-name'), told ? `${this.#lives[0].conn}` : this.#conn);
    if (this.#lives.length) $('ladder-drawing').replaceChildren(draw(lives, ends, this.#width, told));
    else $('ladder-drawing').replaceChildren();
    $('ladder-steps').replaceChildren(...lives.flatMap((life, i) => (life ? asText(life, ends[i]) : [])));
    this.#clock();
  }
}

/** Each end's steps as a list: the drawing for those who do not see it. */
function asText(life, end) {
  const items = end.map((step, i) => h('li', {}, h('b', {}, step.state), step.first ? ' it began' : h('span', {}, ` ${clock(step.at, 6)} `, badge(step.evidence), step.cause ? ` ${words(step.cause)}` : '', step.via ? ` way ${step.via}` : '', i > 1 ? `, ${duration(step.at - end[i - 1].at)} after ${end[i - 1].state}` : '')));
  return [h('h4', { class: `who ${life.role}` }, `${life.role} ${life.local} → ${life.peer}`), h('ol', { 'data-role': life.role }, items)];
}

function draw(lives, ends, width, told) {
  const em = parseFloat(getComputedStyle($('ladder-drawing')).fontSize);
  const [gap, slope, head] = [em * 3.5, em * 2.1, em * 4];
  const found = segments(ends);
  const y = rows(ends, found, { gap, slope, open: em * 6.4 }).map((column) => column.map((value) => value + head));
  const bottom = Math.max(...y.flat(), head + gap) + em * 3.2;
  const side = Math.min(em * 12.5, width * 0.34);
  const x = [side, width - side];
  const svg = s('svg', { viewBox: `0 0 ${width} ${bottom}`, width, height: bottom, role: 'img', 'aria-label': `Ladder of the connection: ${told}. Its steps are listed below.` });
  const heads = ['seen', 'inferred', 'unseen'].map((kind) => s('marker', { id: `tip-${kind}`, class: `tip ${kind}`, viewBox: '0 0 10 10', refX: 9, refY: 5, markerWidth: 9, markerHeight: 9, markerUnits: 'userSpaceOnUse', orient: 'auto-start-reverse' }, s('path', { d: 'M0 1L9 5L0 9z' })));
  svg.append(s('defs', {}, heads));
  // Both ends on one clock: it is one process that saw them.
  const zero = Math.min(...ends.flatMap((end) => (end ?? []).filter((step) => step.at !== null).map((step) => step.at)));
  SIDES.forEach((role, e) => svg.append(...line(role, lives[e], ends[e], x[e], y[e], bottom, em, e ? 1 : -1, side, zero)));
  for (const segment of found) svg.append(...arrow(segment, ends, x, y, em, slope));
  svg.append(...data(ends, found, x, y, em));
  return svg;
}

/** One end: its line, solid below what was seen and dashed below what was inferred, and its states beside it. */
function line(role, life, end, x, y, bottom, em, dir, side, zero) {
  const out = [s('text', { x, y: em * 1.2, class: `role ${life ? role : 'unseen'}`, 'text-anchor': 'middle' }, role)];
  if (!end) {
    out.push(s('text', { x, y: em * 2.3, class: 'time', 'text-anchor': 'middle' }, 'not seen from here'));
    out.push(s('line', { x1: x, x2: x, y1: em * 3, y2: bottom - em, class: 'life unseen' }));
    return out;
  }
  const address = life.local;
  out.push(s('text', { x, y: em * 2.3, class: 'time', 'text-anchor': 'middle' }, side < em * 9 ? `:${address.split(':').pop()}` : address));
  end.forEach((step, i) => {
    const over = step.state === 'CLOSED' && i > 0;
    const next = y[i + 1] ?? (over ? y[i] + em * 1.2 : bottom - em * 0.6);
    out.push(s('line', { x1: x, x2: x, y1: y[i], y2: next, class: `life ${role}${step.first || observed(step) ? '' : ' inferred'}${over ? ' over' : ''}` }));
    if (!step.first) out.push(s('circle', { cx: x, cy: y[i], r: em * 0.32, class: `step ${role}${observed(step) ? '' : ' inferred'}` }, s('title', {}, `${clock(step.at, 6)}: ${EVIDENCE[step.evidence] ?? step.evidence}`)));
    const at = { x: x + dir * em * 0.7, 'text-anchor': dir < 0 ? 'end' : 'start' };
    out.push(s('text', { ...at, y: y[i] + em * (step.first ? 0 : 0.35), class: `state ${role}${step.first || observed(step) ? '' : ' inferred'}` }, step.state));
    if (step.first) return;
    // Nobody timed what was inferred: it was over by then.
    const time = step.at === zero ? clock(step.at, 3) : `+${duration(step.at - zero)}`;
    out.push(s('text', { ...at, y: y[i] + em * 1.35, class: 'time' }, observed(step) ? time : `by ${time}`));
    const why = [step.via ? `way ${step.via}` : '', step.evidence].filter(Boolean).join(', ');
    out.push(s('text', { ...at, y: y[i] + em * 2.25, class: `why${observed(step) ? '' : ' inferred'}` }, side < em * 9 || !step.cause ? why : `${why} · ${words(step.cause)}`));
  });
  return out;
}

function arrow({ from, sent, got, what }, ends, x, y, em, slope) {
  const to = 1 - from;
  const start = sent >= 0 ? y[from][sent] : y[to][got] - slope;
  const end = got >= 0 ? y[to][got] : y[from][sent] + slope;
  const steps = [sent >= 0 ? ends[from][sent] : null, got >= 0 ? ends[to][got] : null];
  // Both its ends were seen, or one; of the other nothing is known.
  const kind = !ends[0] || !ends[1] ? 'unseen' : steps.every((step) => step && observed(step)) ? 'seen' : 'inferred';
  const lost = got < 0 && ends[to];
  const dir = from ? -1 : 1;
  const [x1, x2] = [x[from] + dir * em * 0.5, (lost ? x[from] + (x[to] - x[from]) * 0.6 : x[to]) - dir * em * 0.5];
  const half = lost ? start + (end - start) * 0.6 : end;
  const tilt = (Math.atan2(half - start, Math.abs(x2 - x1)) * 180 / Math.PI) * dir;
  const [mx, my] = [(x1 + x2) / 2, (start + half) / 2 - em * 0.4];
  return [
    s('line', { x1, x2, y1: start, y2: half, class: `segment ${kind} ${SIDES[from]}`, 'marker-end': `url(#tip-${kind})` }),
    s('text', { x: mx, y: my, class: `what ${kind}`, 'text-anchor': 'middle', transform: `rotate(${tilt.toFixed(1)} ${mx} ${my})` }, `${what}${lost ? ' ?' : ''}`),
  ];
}

/** Between the handshake and the first FIN there may be data; how much, or whether any, no state tells. */
function data(ends, found, x, y, em) {
  const open = ends.map((end, e) => (end ? y[e][end.findIndex((step) => step.state === 'ESTABLISHED')] : undefined));
  const known = open.filter((value) => value !== undefined);
  if (!known.length || ends.some((end, e) => end && open[e] === undefined)) return [];
  const top = Math.max(...known) + em * 1.5;
  const ways = found.filter(({ what }) => what === 'FIN' || what === 'RST').map(({ from, sent, got }) => (sent >= 0 ? y[from][sent] : y[1 - from][got] - em * 2.1));
  const below = ways.length ? Math.min(...ways) : top + em * 4;
  const middle = (top + below) / 2;
  if (below - top < em * 1.2) return [];
  const [x1, x2] = [x[0] + em * 0.5, x[1] - em * 0.5];
  return [
    s('line', { x1, x2, y1: middle, y2: middle, class: 'segment data', 'marker-end': 'url(#tip-unseen)', 'marker-start': 'url(#tip-unseen)' }),
    s('text', { x: (x1 + x2) / 2, y: middle - em * 0.45, class: 'what data', 'text-anchor': 'middle' }, 'data'),
  ];
}
