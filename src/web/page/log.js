// The last state changes, one line each, the newest first. Lines are used again: there are never more than so many.

import { $, h, mark, say } from './draw.js';
import { badge } from './facts.js';
import { EVIDENCE, clock, count, duration, things, words } from './words.js';

const SHOWN = 120;

export class Log {
  #rows = [];
  #paused = false;
  #waiting = [];
  #beyond = 0;

  /** Whether there are ladders to be drawn. */
  ladders = true;

  /** `chosen(conn)` is told whose line was clicked. */
  constructor(chosen) {
    $('pause').addEventListener('click', () => this.#pause(!this.#paused));
    $('log').addEventListener('click', (event) => {
      const line = event.target.closest('button.conn');
      if (line?.dataset.conn) chosen(line.dataset.conn);
    });
  }

  #pause(paused) {
    this.#paused = paused;
    mark($('pause'), 'aria-pressed', String(paused));
    say($('pause'), paused ? 'Go on' : 'Pause');
    if (paused) return this.#note();
    const [waiting, beyond] = [this.#waiting, this.#beyond];
    [this.#waiting, this.#beyond] = [[], 0];
    if (beyond) this.#put({ note: `${things(beyond, 'older change', 'older changes')} came while paused and ${beyond === 1 ? 'is' : 'are'} not listed` });
    waiting.forEach((entry) => this.#put(entry));
    this.#note();
  }

  #note() {
    const waiting = this.#waiting.length;
    say($('log-note'), this.#paused ? `Paused. ${things(waiting + this.#beyond, 'line waits', 'lines wait')}.` : '');
  }

  /** A batch: lines, and how many more there were. */
  batch({ lines, more }) {
    lines.forEach((line) => this.#add(line));
    if (more) this.#add({ note: `and ${count(more)} more in the same moment: counted in the diagram, not listed` });
  }

  /** What happened before this page was opened, as far as the last lives tell it. */
  async before(at) {
    const answer = await fetch(`/api/connections?limit=${SHOWN / 4}`).catch(() => null);
    if (!answer?.ok) return;
    const lines = (await answer.json()).flatMap(({ steps, began, ...life }) =>
      steps.map((step, i) => ({ ...life, ...step, from: i ? steps[i - 1].to : began, after: undefined })));
    const old = lines.filter((line) => line.at < at).sort((a, b) => b.at - a.at).slice(0, SHOWN / 2);
    // Below what came meanwhile.
    if (old.length) [{ note: 'Before this page was opened; times in a state are not kept:' }, ...old].forEach((entry) => this.#put(entry, true));
  }

  /** Something to say between the lines. */
  say(note) {
    this.#add({ note, strong: true });
  }

  #add(entry) {
    if (!this.#paused) return this.#put(entry);
    this.#waiting.push(entry);
    if (this.#waiting.length > SHOWN) {
      this.#waiting.shift();
      this.#beyond += 1;
    }
    this.#note();
  }

  #put(entry, below = false) {
    if (below && this.#rows.length >= SHOWN) return;
    const row = this.#rows.length < SHOWN ? this.#row() : this.#rows.shift();
    // The oldest line is the first to be used again.
    if (below) this.#rows.unshift(row);
    else this.#rows.push(row);
    mark(row.li, 'class', entry.note ? `note${entry.strong ? ' strong' : ''}` : null);
    for (const part of row.parts) part.hidden = Boolean(entry.note);
    row.note.hidden = !entry.note;
    if (entry.note) say(row.note, entry.note);
    else this.#fill(row, entry);
    if (below) $('log-lines').append(row.li);
    else $('log-lines').prepend(row.li);
  }

  #row() {
    const part = (name) => h('span', { class: name });
    const conn = h('button', { type: 'button', class: 'conn', title: 'Draw its ladder' });
    const [time, role, from, to, after, cause, flow, note] = ['time', 'role', 'from', 'to', 'after', 'cause', 'flow', 'text'].map(part);
    const evidence = badge('inferred');
    const parts = [time, role, conn, from, to, after, cause, evidence, flow];
    return { li: h('li', {}, parts, note), parts, note, time, role, conn, from, to, after, cause, evidence, flow };
  }

  #fill(row, line) {
    say(row.time, clock(line.at));
    mark(row.role, 'class', `role who ${line.role}`);
    say(row.role, line.role);
    say(row.conn, line.conn);
    mark(row.conn, 'data-conn', line.conn);
    row.conn.disabled = !this.ladders;
    say(row.from, line.from);
    say(row.to, `→ ${line.to}`);
    say(row.after, line.after === undefined ? '' : `after ${duration(line.after)}`);
    say(row.cause, [line.cause ? words(line.cause) : '', line.via ? `way ${line.via}` : '', line.retransmits ? `${line.retransmits} retransmitted` : ''].filter(Boolean).join(', '));
    mark(row.evidence, 'class', `badge ${line.evidence}`);
    mark(row.evidence, 'title', EVIDENCE[line.evidence]);
    say(row.evidence, line.evidence);
    say(row.flow, `${line.local} → ${line.peer}`);
  }
}
