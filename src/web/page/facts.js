// What a state means: the table behind `echoscope explain`, and who is in that state now.

import { $, h, say } from './draw.js';
import { EVIDENCE, LABEL, age, count, words } from './words.js';
import { sum } from './sockets.js';

export class Facts {
  #states = null;
  #chosen = null;
  #shown = null;
  #services = [];
  #totals = [];

  /** `chosen(state)` is told which state is chosen, `meanings(by state)` what each of them means. */
  constructor(chosen, meanings) {
    this.chosen = chosen;
    this.meanings = meanings;
    this.#load();
    $('facts-close').addEventListener('click', () => this.look(null, true));
  }

  /** Without the table the page still works; it is asked for again when it is needed. */
  async #load() {
    try {
      const { states } = await (await fetch('/api/states')).json();
      this.#states = new Map(states.map((facts) => [facts.state, facts]));
      this.meanings(new Map(states.map(({ state, meaning }) => [state, meaning])));
    } catch {
      this.#states = null;
    }
    if (this.#shown) this.#show(this.#shown);
  }

  /** Somebody looks at a state, or chooses it; choosing it twice, or none, lets it go. */
  look(state, choose) {
    if (choose) {
      this.#chosen = state === this.#chosen ? null : state;
      this.chosen(this.#chosen);
      state = this.#chosen;
    }
    const shown = state ?? this.#chosen;
    if (shown === this.#shown && !choose) return;
    this.#show(shown);
  }

  #show(state) {
    this.#shown = state;
    $('facts').hidden = !state;
    $('legend').hidden = Boolean(state);
    $('facts-close').hidden = !this.#chosen;
    if (!state) return;
    say($('facts-name'), state);
    const facts = this.#states?.get(state);
    if (!facts) {
      $('facts-told').replaceChildren(h('p', {}, 'What it means cannot be had just now.'));
      this.#load();
      return;
    }
    const list = (items) => h('ul', {}, items.map((item) => h('li', {}, item)));
    const limits = Object.entries(facts.here.limits).filter(([, seconds]) => seconds !== null);
    $('facts-told').replaceChildren(
      h('p', { class: 'meaning' }, facts.meaning),
      h('p', {}, facts.waiting),
      h('h4', {}, 'What piles it up'), list(facts.piles_up),
      h('h4', {}, 'How long'), h('p', {}, facts.lasts.words),
      limits.length > 0 && list(limits.map(([when, seconds]) => `Here: ${age(seconds)} when ${when}.`)),
      h('details', {}, h('summary', {}, 'What to do'), list(facts.remedies)),
      h('details', {}, h('summary', {}, 'What ends it'), list(facts.ends.map(({ to, on }) => `→ ${to}: ${on.join(' · ')}`))),
      h('p', { class: 'aside' }, h('code', {}, `echoscope explain ${state}`)),
    );
    this.#now();
  }

  show(services) {
    this.#services = services;
    this.#now();
  }

  /** How often each way was walked so far: role, from, to, evidence, how often. */
  walked(totals) {
    this.#totals = totals;
    this.#now();
  }

  #now() {
    const state = this.#shown;
    if (!state) return;
    const rows = ['client', 'server'].map((role) => {
      const { n, oldest, atLeast } = sum(this.#services, role, LABEL[state]);
      const time = oldest !== null && state !== 'LISTEN' ? `, the oldest for ${atLeast ? 'at least ' : ''}${age(oldest)}` : n > 0 && state !== 'LISTEN' ? ', their age is not known' : '';
      return h('li', {}, h('span', { class: `who ${role}` }, role), ` ${count(n)}${time}`);
    });
    const ways = new Map();
    for (const [role, from, to, evidence, times] of this.#totals) {
      if (from !== state && to !== state) continue;
      const key = `${from} → ${to}`;
      const way = ways.get(key) ?? ways.set(key, new Map()).get(key);
      const seen = `${role}, ${words(evidence)}`;
      way.set(seen, (way.get(seen) ?? 0) + times);
    }
    const walks = [...ways].map(([key, by]) =>
      h('li', {}, h('b', {}, key), ` ${count([...by.values()].reduce((a, b) => a + b, 0))}`, h('small', {}, ` (${[...by].map(([seen, times]) => `${seen} ${count(times)}`).join(' · ')})`)));
    $('facts-now').replaceChildren(h('ul', {}, rows), ...(walks.length ? [h('h4', {}, 'Walked so far'), h('ul', { class: 'walks' }, walks)] : []));
  }
}

/** The kinds of evidence, for the legend. */
export function evidenceLegend() {
  $('evidence').replaceChildren(...Object.entries(EVIDENCE).flatMap(([kind, said]) => [h('dt', {}, badge(kind)), h('dd', {}, said)]));
}

/** Who saw something. */
export function badge(kind) {
  return h('span', { class: `badge ${kind}`, title: EVIDENCE[kind] ?? '' }, kind);
}
