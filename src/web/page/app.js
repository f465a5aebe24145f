// The live page: what comes in by /events, and who shows it.

import { Charts } from './charts.js';
import { Diagram } from './diagram.js';
import { $, h, mark, say } from './draw.js';
import { Facts, evidenceLegend } from './facts.js';
import { Feed } from './feed.js';
import { Holders, Services } from './holders.js';
import { Ladder } from './ladder.js';
import { Lives } from './lives.js';
import { Log } from './log.js';
import { findings, services } from './sockets.js';
import { clock, count, things } from './words.js';

const LOSSES = {
  events: ['time the kernel’s events were lost', 'times the kernel’s events were lost'],
  log_lines: ['log line lost', 'log lines lost'],
  not_followed: ['connection not followed to its end', 'connections not followed to their end'],
  missed: ['connection in no count', 'connections in no count'],
  page: ['change not listed on this page', 'changes not listed on this page'],
};

const page = {
  version: null,
  /** Whether lives are followed, and whether changes are told at all; null until that is known. */
  lives: null,
  changes: null,
  chosen: 'all',
  census: null,
  lost: {},
  /** How many changes this page was not told of one by one. */
  missed: 0,
  totals: new Map(),
  greeted: null,
  recalled: false,
};

const facts = new Facts((state) => diagram.choose(state), (meanings) => diagram.describe(meanings));
const diagram = new Diagram((state, chosen) => facts.look(state, chosen));
const charts = new Charts();
const ladder = new Ladder();
const lives = new Lives((conn) => ladder.choose(conn));
const log = new Log((conn) => {
  lives.choose(conn);
  $('ladder-title').scrollIntoView({ block: 'nearest' });
});
const table = new Services((key) => choose(key === page.chosen ? 'all' : key));
const holders = new Holders();
evidenceLegend();
$('service').addEventListener('change', () => choose($('service').value));
$('all').addEventListener('click', () => choose('all'));

function choose(key) {
  page.chosen = key;
  charts.clear();
  if (page.census) show(page.census);
}

function shown() {
  const all = services(page.census);
  return page.chosen === 'all' ? all : all.filter(({ key }) => key === page.chosen);
}

function show(census) {
  const all = services(census);
  const options = all.filter(({ role, sockets }) => role === 'server' || Object.values(sockets).some((n) => n > 0));
  if (page.chosen !== 'all' && !all.some(({ key }) => key === page.chosen)) page.chosen = 'all';
  const wanted = options.map(({ key, name }) => [key, name]);
  const known = [...$('service').options].slice(1).map((option) => [option.value, option.text]);
  if (JSON.stringify(wanted) !== JSON.stringify(known)) {
    $('service').replaceChildren(h('option', { value: 'all' }, 'all of them'), ...wanted.map(([value, name]) => h('option', { value }, name)));
  }
  $('service').value = page.chosen;
  const wrong = findings(census);
  const list = shown();
  diagram.show(list, wrong);
  facts.show(list);
  table.show(all, page.chosen);
  $('all').hidden = page.chosen === 'all';
  warn(wrong);
  ports(census);
}

function warn(wrong) {
  const texts = wrong.map(({ text }) => text).join('\n');
  if ($('warnings').dataset.told === texts) return;
  $('warnings').dataset.told = texts;
  $('warnings').replaceChildren(...wrong.map(({ bad, text }) => h('li', { class: bad ? 'bad' : 'warn' }, h('b', {}, bad ? 'Critical: ' : 'Warning: '), text)));
}

function ports(census) {
  const pairs = census.targets
    ? census.targets.map(({ target, local_ports_used: used }) => [`towards ${target}`, used])
    : (census.local_ports ?? []).slice(0, 3).map(({ from, to, used }) => [`from ${from} to ${to}`, used]);
  const limit = census.targets?.[0]?.local_ports_limit ?? census.local_ports_limit;
  const told = pairs.slice(0, 8).map(([way, used]) => `${count(used)} of ${limit ? count(limit) : '?'} local ports ${way}`);
  const queues = census.services.filter(({ accept_queue: queue }) => queue).slice(0, 8).map(({ port, accept_queue: { length, limit } }) => `${count(length)} of ${limit ? count(limit) : '?'} wait to be accepted at port ${port}`);
  const lines = page.lives === false ? told : [...queues, ...told];
  if ($('room').dataset.told !== lines.join('\n')) {
    $('room').dataset.told = lines.join('\n');
    $('room').replaceChildren(...lines.map((line) => h('li', {}, line)));
  }
}

function losses() {
  const all = { ...page.lost, ...(page.changes ? { page: page.missed } : {}) };
  const told = Object.entries(all).map(([what, n]) => [n, LOSSES[what] ? things(n, ...LOSSES[what]) : `${what}: ${count(n)}`]);
  const lost = told.filter(([n]) => n > 0).map(([, text]) => text);
  $('losses').classList.toggle('some', lost.length > 0);
  say($('losses'), lost.length ? `Lost: ${lost.join(' · ')}` : 'Nothing lost');
  mark($('losses'), 'title', told.map(([, text]) => text).join('\n'));
}

/** What only a process that follows lives can show, and what only one that does not; with changes, or with counts only. */
function arrange(followed, changes) {
  [page.lives, page.changes, log.ladders] = [followed, changes, followed];
  document.body.classList.toggle('watch', !followed);
  document.body.classList.toggle('changes', changes);
  const shows = { lives: followed, watch: !followed, changes, counts: !changes };
  for (const element of document.querySelectorAll('[data-if]')) element.hidden = !shows[element.dataset.if];
  if (followed) lives.start();
  else {
    lives.stop();
    holders.start();
  }
}

function totals() {
  const list = [...page.totals.values()];
  diagram.walked(list);
  facts.walked(list);
  const changes = list.reduce((sum, walk) => sum + walk[4], 0);
  say($('walked'), `${count(changes)} changes of state since the process began${page.lives ? '' : ', of all services'}`);
}

const feed = new Feed({
  state(how, why) {
    document.body.dataset.feed = how;
    say($('state'), how === 'open' ? 'live' : `connection lost${why ? `: ${why}` : ''}; trying again`);
    if (how !== 'open') charts.gap();
  },
  hello({ version, transitions, lives: followed, restarted, walked }) {
    if (page.version && page.version !== version) say($('version'), `${version}: load this page anew, it is of ${page.version}`);
    else say($('version'), version);
    page.version ??= version;
    if (restarted) {
      log.say('Another process answers than before: what happened in between is not known.');
      page.missed = 0;
      charts.clear();
    }
    if (page.lives !== followed || page.changes !== transitions) arrange(followed, transitions);
    page.greeted ??= performance.now();
    page.totals = new Map(walked.map((walk) => [walk.slice(0, 4).join(), walk]));
    totals();
  },
  walked(batch) {
    for (const walk of batch.walks) {
      const key = walk.slice(0, 4).join();
      const known = page.totals.get(key);
      if (known) known[4] += walk[4];
      else page.totals.set(key, [...walk]);
    }
    diagram.walk(batch.walks);
    log.batch(batch);
    if (batch.lines.some((line) => ladder.concerns(line.conn))) ladder.refresh();
  },
  missed({ transitions }) {
    page.missed += transitions;
    log.say(`${things(transitions, 'change is', 'changes are')} not listed: this page was away, or read too slowly. The counts are right again.`);
    losses();
  },
  sockets({ at, ready, lost, sockets }) {
    const ahead = at - Date.now() / 1000;
    ladder.ahead = lives.ahead = ahead;
    page.lost = lost;
    losses();
    if (page.changes) totals();
    // Changes are told one by one from the greeting on; what was before is in the last lives.
    if (page.lives && !page.recalled) log.before(at - (performance.now() - page.greeted) / 1000);
    page.recalled = true;
    say($('ready'), ready ? 'takes work' : 'starting or draining');
    $('ready').classList.toggle('not', !ready);
    say($('time'), `${clock(at, 0)} UTC`);
    $('unreadable').hidden = Boolean(sockets);
    page.census = sockets;
    charts.add(at, sockets && shown());
    if (sockets) {
      say($('observer'), sockets.observer);
      show(sockets);
    } else diagram.unknown();
  },
  end() {
    log.say('The process ends.');
  },
});

// For whoever looks with the developer tools, and for the tests.
window.echoscope = { page, feed };
