// What the page must show. Each check has a name, and opens what it needs.

import { once } from 'node:events';
import { request } from 'node:http';
import { connect } from 'node:net';
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { assert, counts, open, port, sleep, start, until } from './stage.mjs';

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const LABELS = {
  close: 'CLOSED', listen: 'LISTEN', syn_sent: 'SYN_SENT', syn_recv: 'SYN_RECV', established: 'ESTABLISHED', fin_wait1: 'FIN_WAIT1',
  fin_wait2: 'FIN_WAIT2', closing: 'CLOSING', time_wait: 'TIME_WAIT', close_wait: 'CLOSE_WAIT', last_ack: 'LAST_ACK',
};

/** What the textbook says, end by end. */
const CLIENT = ['CLOSED', 'SYN_SENT', 'ESTABLISHED', 'FIN_WAIT1', 'FIN_WAIT2', 'TIME_WAIT', 'CLOSED'];
const SERVER = ['LISTEN', 'SYN_RECV', 'ESTABLISHED', 'CLOSE_WAIT', 'LAST_ACK', 'CLOSED'];
const SEGMENTS = ['SYN', 'SYN+ACK', 'ACK', 'data', 'FIN', 'ACK of FIN', 'FIN', 'ACK of FIN'];

export async function axe(page, where) {
  await page.evaluate(`${AXE}; 0`);
  const found = await page.evaluate(async () => (await window.axe.run()).violations.map(({ id, impact, nodes }) => ({ id, impact, nodes: nodes.slice(0, 3).map((node) => `${node.html.slice(0, 120)} ${node.any?.[0]?.message ?? ''}`) })));
  const serious = found.filter(({ impact }) => impact === 'serious' || impact === 'critical');
  assert(serious.length === 0, `axe, ${where}: ${JSON.stringify(serious, null, 1)}`);
  return found.length;
}

const text = (page, selector) => page.locator(selector).evaluateAll((all) => all.map((element) => element.textContent));
const steps = (page, role) => page.locator(`#ladder-steps ol[data-role=${role}] b`).evaluateAll((all) => all.map((b) => b.textContent));

/** Counts are those of the API, for sockets that stay where they are; one end's ladder is grey at the other. */
export async function countsAreTheApis(browser, binary) {
  const [web, echo] = [await port(), await port()];
  const server = await start(binary, web, 'server', '--listen', `127.0.0.1:${echo}`, '--close-delay', '10m');
  const sockets = [];
  for (let i = 0; i < 12; i++) {
    const socket = connect({ port: echo, host: '127.0.0.1', allowHalfOpen: true });
    await once(socket, 'connect');
    sockets.push(socket);
    if (i < 5) socket.end();
  }
  const { page, seen, close } = await open(browser, server);
  const equal = async () => {
    const { services } = await server.json('/api/sockets');
    const shown = await counts(page);
    const differ = Object.entries(LABELS).filter(([label, state]) => ['client', 'server'].some((role, i) => {
      const n = services.filter((service) => service.role === role).reduce((sum, service) => sum + service.sockets[label], 0);
      return shown[state][i] !== String(n);
    }));
    return differ.length === 0 && shown.CLOSE_WAIT[1] === '5' && shown.ESTABLISHED[1] === '7' && shown.LISTEN[1] === '1';
  };
  await until('the counts to be those of the API', equal);
  // A state's meaning, by hover and by focus; CLOSE_WAIT that ages is a warning.
  await page.hover('.node[data-state=CLOSE_WAIT]');
  await page.waitForFunction(() => document.querySelector('#facts-told .meaning')?.textContent.includes('our application has not'));
  assert((await page.textContent('#facts-told')).includes('What piles it up'), 'what piles it up');
  assert((await page.textContent('#facts-now')).includes('server 5, the oldest for'), await page.textContent('#facts-now'));
  // The ladder of each, which is drawn a moment later.
  const waiting = page.locator('#lives li', { hasText: 'CLOSE_WAIT' });
  assert(await waiting.count() === 5, `${await waiting.count()} in CLOSE_WAIT`);
  const otherwise = [];
  for (let i = 0; i < 5; i++) {
    let told = [];
    await waiting.nth(i).click();
    await until('one end’s states', async () => (told = await steps(page, 'server')).join() === 'LISTEN,SYN_RECV,ESTABLISHED,CLOSE_WAIT', 3000).catch(() => otherwise.push(told.join()));
  }
  await fewAndCounted(server, otherwise, 5);
  assert((await text(page, '#ladder-drawing .role')).join() === 'client,server', 'both lines are drawn');
  assert(await page.locator('#ladder-drawing .life.unseen').count() === 1, 'the other end is grey');
  assert((await page.textContent('#ladder-notes')).includes('One end only'), 'and it is said');
  await until('an old CLOSE_WAIT to be a warning', async () => {
    // A minute is long: what the page makes of an old one is what is looked at.
    await page.evaluate(async () => {
      const { findings } = await import('/page/sockets.js');
      const census = structuredClone(window.echoscope.page.census);
      census.services[0].oldest_seconds.close_wait = 61;
      window.found = findings(census);
      census.services[0].oldest_seconds.close_wait = 901;
      window.found.push(...findings(census));
    });
    const found = await page.evaluate(() => window.found);
    return found.length === 2 && found[0].state === 'CLOSE_WAIT' && !found[0].bad && found[1].bad;
  });
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  sockets.forEach((socket) => socket.destroy());
  await close();
  await server.end();
}

/** What a kernel hid while some process was at work: that is rare, and told as a loss (docs/ebpf.md, Losses). */
async function fewAndCounted(program, hidden, of) {
  assert(hidden.length <= 2, `of ${of}: ${hidden.join('\n')}`);
  if (hidden.length) await until(`these to be counted: ${hidden.join('\n')}`, async () => await program.metric('echoscope_observer_lost_events_total') > 0);
}

/** A connection that begins while the page is open walks the arrows, and its ladder is the textbook's. Returns what checks its end. */
async function everyArrowIsWalked(page) {
  await until('every textbook arrow to be walked', async () => page.evaluate(() => ['CLOSED SYN_SENT', 'SYN_SENT ESTABLISHED', 'ESTABLISHED FIN_WAIT1', 'FIN_WAIT1 FIN_WAIT2', 'FIN_WAIT2 TIME_WAIT'].every((arrow) => document.querySelector(`[data-arrow="${arrow}"] .walk.client`).getAttribute('visibility') === 'visible')
    && ['LISTEN SYN_RECV', 'SYN_RECV ESTABLISHED', 'ESTABLISHED CLOSE_WAIT', 'CLOSE_WAIT LAST_ACK', 'LAST_ACK CLOSED'].every((arrow) => document.querySelector(`[data-arrow="${arrow}"] .walk.server`).getAttribute('visibility') === 'visible')));
}

/** Of others: the arrows and the log, but no connections and no ladders. As root it must be so. */
export async function announcedToAWatch(browser, binary, look) {
  const watch = await start(binary, await port(), 'watch');
  const { page, seen, close } = await open(browser, watch);
  const observer = await until('an observer', async () => (await page.textContent('#observer')).trim());
  if (observer === 'ebpf') {
    await everyArrowIsWalked(page);
    await until('its log', async () => await page.locator('#log li .conn').count() >= 5);
    assert(await page.locator('#log .conn').first().isDisabled() && await page.locator('#lives').isHidden(), 'nobody’s ladder can be drawn');
    assert(await page.getByText('Counts only.').isHidden(), 'it is not counts only');
    const listed = await page.locator('#log li').evaluateAll((all) => all.map((li) => ({ step: li.textContent, evidence: li.querySelector('.badge').textContent })));
    await fewAndCounted(watch, listed.filter(({ evidence }) => !['tracepoint', 'sock_diag'].includes(evidence)).map(({ step }) => step), listed.length);
    await axe(page, 'a watch by eBPF');
    await look(page);
  } else assert(process.getuid() !== 0, `root’s watch sees by ${observer}`);
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  await close();
  await watch.end();
}

export async function aLifeIsWalked({ page, seen }) {
  // The next one that begins, from the log, by its name.
  const before = new Set(await text(page, '#log .conn'));
  const conn = await until('a connection to begin', async () => {
    const rows = await page.locator('#log li').evaluateAll((all) => all.map((li) => [li.querySelector('.conn').dataset.conn, li.querySelector('.to').textContent]));
    return rows.find(([conn, to]) => to === '→ SYN_SENT' && !before.has(conn))?.[0];
  });
  await page.locator(`#log .conn[data-conn="${conn}"]`).first().click();
  await page.waitForFunction((conn) => document.querySelector('#ladder-name').textContent === conn, conn);
  await everyArrowIsWalked(page);
  await until('TIME_WAIT', async () => (await steps(page, 'client')).at(-1) === 'TIME_WAIT' && (await steps(page, 'server')).at(-1) === 'CLOSED');
  assert((await steps(page, 'client')).join() === CLIENT.slice(0, -1).join(), `client: ${await steps(page, 'client')}`);
  assert((await steps(page, 'server')).join() === SERVER.join(), `server: ${await steps(page, 'server')}`);
  assert((await text(page, '#ladder-drawing .state.client')).join() === CLIENT.slice(0, -1).join(), 'the same is drawn');
  assert((await text(page, '#ladder-drawing .state.server')).join() === SERVER.join(), 'the same is drawn');
  const inOrder = await page.locator('#ladder-drawing .what').evaluateAll((all) => all.map((what) => [what.getBoundingClientRect().top, what.textContent]).sort((a, b) => a[0] - b[0]).map(([, what]) => what));
  assert(inOrder.join() === SEGMENTS.join(), `segments: ${inOrder}`);
  // Nobody saw the client's SYN leave: what was inferred is dashed, and what was observed is not.
  const inferred = await page.locator('#ladder-drawing .state.inferred').evaluateAll((all) => all.map((state) => state.textContent));
  const life = await page.evaluate(async (conn) => (await fetch(`/api/connections?conn=${conn}`)).json(), conn);
  const expected = ['client', 'server'].flatMap((role) => life.find((end) => end.role === role).steps.filter((step) => step.evidence === 'inferred').map((step) => step.to));
  assert(inferred.join() === expected.join(), `inferred: ${inferred}, expected ${expected}`);
  const [solid, dashed] = [await page.locator('#ladder-drawing .segment.seen').count(), await page.locator('#ladder-drawing .segment.inferred').count()];
  if (await page.textContent('#observer') === 'ebpf') assert(expected.length === 0 && solid === 7 && dashed === 0, `the kernel told of every step: ${solid} solid, ${dashed} dashed`);
  else assert(expected.includes('SYN_SENT') && solid > 0 && dashed > 0, `${solid} solid, ${dashed} dashed`);
  const left = async () => Number(/: (\d+) of 60 s left/.exec(await page.textContent('#time-wait-left'))?.[1]);
  const first = await left();
  assert(first > 40 && first <= 60, `TIME_WAIT's clock: ${first}`);
  await until('the clock to run down', async () => await left() < first - 2);
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  return async () => {
    await until('the end of TIME_WAIT', async () => (await steps(page, 'client')).length === 7, 75_000);
    assert((await steps(page, 'client')).join() === CLIENT.join(), 'all seven states');
    assert(await page.locator('#time-wait').isHidden(), 'no clock any more');
  };
}

export async function filtersAndKeyboard({ page, seen }) {
  const column = (name) => page.locator(`#lives .${name}`).evaluateAll((all) => all.map((cell) => cell.textContent));
  const filtered = async (id, value, name, wanted) => {
    await page.selectOption(id, value);
    await until(`${id} ${value}`, async () => {
      const cells = await column(name);
      return cells.length > 0 && cells.every((cell) => cell === wanted);
    });
  };
  await filtered('#by-role', 'server', 'role', 'server');
  await filtered('#by-state', 'CLOSED', 'state', 'CLOSED');
  await page.selectOption('#by-role', 'client');
  await filtered('#by-state', 'TIME_WAIT', 'state', 'TIME_WAIT');
  await filtered('#by-outcome', 'graceful', 'outcome', 'graceful');
  await page.selectOption('#by-outcome', 'reset');
  await until('none', async () => (await page.textContent('#lives-note')) === 'None.' && (await column('conn')).length === 0);
  for (const id of ['#by-role', '#by-state', '#by-outcome']) await page.selectOption(id, '');
  await page.selectOption('#by-order', 'longest');
  await until('the longest first', async () => (await column('way'))[0]?.startsWith('listens on'));
  await page.selectOption('#by-order', 'youngest');
  await until('the most recent first', async () => (await column('way'))[0]?.startsWith('127'));

  // From the top with the keyboard alone.
  await page.evaluate(() => { document.activeElement.blur(); scrollTo(0, 0); });
  await page.keyboard.press('Tab');
  assert(await page.evaluate(() => document.activeElement.textContent) === 'To the state diagram', 'the first stop skips');
  const focused = () => page.evaluate(() => document.activeElement.closest('.node')?.dataset.state ?? document.activeElement.id);
  for (let i = 0; i < 12 && await focused() !== 'CLOSED'; i++) await page.keyboard.press('Tab');
  assert(await focused() === 'CLOSED', 'the diagram follows');
  for (const [key, state] of [['ArrowDown', 'LISTEN'], ['ArrowDown', 'ESTABLISHED'], ['ArrowRight', 'SYN_SENT'], ['ArrowDown', 'CLOSE_WAIT'], ['ArrowDown', 'LAST_ACK'], ['ArrowLeft', 'CLOSING'], ['ArrowDown', 'TIME_WAIT']]) {
    await page.keyboard.press(key);
    assert(await focused() === state, `${key}: ${await focused()}, not ${state}`);
    assert(await page.textContent('#facts-name') === state, `the facts of ${state} by focus`);
  }
  await page.keyboard.press('Enter');
  assert(await page.getAttribute('.node[data-state=TIME_WAIT] .hit', 'aria-pressed') === 'true', 'chosen');
  await page.focus('#hold');
  assert(await page.textContent('#facts-name') === 'TIME_WAIT', 'it stays');
  await page.focus('.node[data-state=LISTEN] .hit');
  await page.keyboard.press('Escape');
  assert(await page.getAttribute('.node[data-state=TIME_WAIT] .hit', 'aria-pressed') === 'false', 'let go');
  await page.focus('#hold');
  await page.keyboard.press('Space');
  await page.focus('#lives');
  const names = await column('conn');
  for (const [key, at] of [['Home', 0], ['ArrowDown', 1], ['ArrowDown', 2], ['ArrowUp', 1], ['End', names.length - 1]]) {
    await page.keyboard.press(key);
    await until(`${key} to choose`, async () => (await page.textContent('#ladder-name')) === names[at]);
    const active = await page.getAttribute('#lives', 'aria-activedescendant');
    assert(await page.getAttribute(`#${active}`, 'aria-selected') === 'true', 'the active one is the selected one');
  }
  await page.keyboard.press('Escape');
  assert(await page.locator('#ladder').isHidden(), 'none is chosen');
  await page.uncheck('#hold');

  // Paused, nothing moves, and what waits is counted.
  await page.click('#pause');
  const top = await page.textContent('#log li');
  await until('lines to wait', async () => /Paused\. \d+ lines? wait/.test(await page.textContent('#log-note')) && !(await page.textContent('#log-note')).includes(' 0 '));
  assert(await page.textContent('#log li') === top, 'it stands still');
  await page.click('#pause');
  await until('it to go on', async () => await page.textContent('#log li') !== top);
  assert((await text(page, '#log .badge')).some((badge) => badge === 'tcp_info'), 'evidence badges');
  assert(await page.textContent('#losses') === 'Nothing lost', await page.textContent('#losses'));
  assert(seen.faults.length === 0, seen.faults.join('\n'));
}

/** Nothing moves for whoever wants that; arrows still light up. */
export async function stillness(browser, pair) {
  const { page, close, seen } = await open(browser, pair, { reducedMotion: 'reduce' });
  await page.waitForSelector('.walk.client[visibility=visible]');
  for (let i = 0; i < 10; i++) {
    assert(await page.locator('.dot[visibility=visible]').count() === 0, 'no dots');
    await sleep(100);
  }
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  await close();
}

/** A server that is killed and started again is found again, and the page says so; a full house is said in words. */
export async function restartAndFullHouse(browser, binary) {
  const [web, echo] = [await port(), await port()];
  const args = [binary, web, 'server', '--listen', `127.0.0.1:${echo}`];
  let server = await start(...args);
  const { page, seen, close } = await open(browser, server);
  seen.away = true;
  await server.end();
  await page.waitForFunction(() => document.getElementById('state').textContent.startsWith('connection lost'));
  server = await start(...args);
  await page.waitForFunction(() => document.getElementById('state').textContent === 'live');
  await page.waitForFunction(() => document.getElementById('log').textContent.includes('Another process answers'));
  // A stop with words: the stream ends, and the page says so.
  await server.end('SIGTERM');
  await page.waitForFunction(() => document.getElementById('log').textContent.includes('The process ends.'));
  await page.goto('about:blank');
  server = await start(...args);
  const viewers = [];
  for (let i = 0; i < 16; i++) {
    const viewer = request({ port: web, host: '127.0.0.1', path: '/events', agent: false }).on('error', () => {});
    viewer.end();
    viewers.push(viewer);
    const [answer] = await once(viewer, 'response');
    assert(answer.statusCode === 200, `viewer ${i}: ${answer.statusCode}`);
    answer.resume().on('error', () => {});
  }
  await page.goto(server.url);
  await page.waitForFunction(() => document.getElementById('state').textContent.includes('too many look already'));
  viewers.forEach((viewer) => viewer.destroy());
  await page.waitForFunction(() => document.getElementById('state').textContent === 'live');
  seen.away = false;
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  await close();
  await server.end();
}

/** Trouble that would take long to make: the page is told of it by a stream of the test's own. */
export async function trouble(browser, server, look) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  const faults = [];
  page.on('pageerror', (error) => faults.push(error.message));
  page.on('console', (message) => message.type() === 'error' && faults.push(message.text()));
  const census = await server.json('/api/sockets');
  const at = Date.now() / 1000;
  const event = (name, data) => `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;
  Object.assign(census.services[0], { oldest_seconds: { close_wait: 200 } });
  census.services[0].sockets.close_wait = 12_345;
  census.targets = [{ target: 'db:5432', local_ports_used: 27_500, local_ports_limit: 28_232 }];
  const line = { at, conn: '2a', role: 'client', local: '127.0.0.1:4', peer: '127.0.0.1:7', from: 'FIN_WAIT1', to: 'TIME_WAIT', evidence: 'sock_diag', via: 'unknown' };
  const hostile = { ...line, conn: '<img src=x>', cause: '<script>alert(1)</script>', local: '"><b>x</b>' };
  const walks = [['client', 'FIN_WAIT1', 'TIME_WAIT', 'sock_diag', 1], ['server', 'ESTABLISHED', 'CLOSED', 'tcp_info', 1], ['client', 'NOWHERE', 'CLOSED', 'tcp_info', 1]];
  const stream = [
    'retry: 600000\n\n',
    event('hello', { version: '0', transitions: true, lives: true, restarted: false, walked: walks.slice(0, 2) }),
    event('sockets', { at, ready: false, lost: { events: 2, log_lines: 0, not_followed: 1, new_kind: 3 }, sockets: census }),
    event('walked', { at, walks, lines: [line, hostile], more: 1_234 }),
    event('missed', { transitions: 77 }),
  ];
  await page.route('**/events*', (route) => route.fulfill({ contentType: 'text/event-stream', body: stream.join('') }));
  await page.goto(server.url);
  await page.waitForFunction(() => document.getElementById('log').textContent.includes('77 changes are not listed'));
  const is = (state, name) => page.evaluate(([state, name]) => document.querySelector(`.node[data-state=${state}]`).classList.contains(name), [state, name]);
  assert(await is('CLOSE_WAIT', 'warn') && !(await is('CLOSE_WAIT', 'bad')), 'CLOSE_WAIT that ages is a warning');
  assert(await is('TIME_WAIT', 'bad'), 'ports that run short are shown where they are');
  const warnings = await page.textContent('#warnings');
  assert(warnings.includes('12,345 CLOSE_WAIT, the oldest for 3 min 20 s') && warnings.includes('27,500 of 28,232 local ports towards db:5432'), warnings);
  const losses = await page.textContent('#losses');
  assert(losses === 'Lost: 2 times the kernel’s events were lost · 1 connection not followed to its end · new_kind: 3 · 77 changes not listed on this page', losses);
  assert(await page.textContent('#ready') === 'starting or draining', 'it drains');
  assert(await page.locator('[data-arrow="FIN_WAIT1 TIME_WAIT"].unknown').count() === 1, 'a way that nobody saw is drawn as such');
  assert(await page.locator('[data-arrow="ESTABLISHED CLOSED"].sudden.walked').count() === 1, 'a sudden end');
  const log = await page.textContent('#log');
  assert(log.includes('and 1,234 more in the same moment') && log.includes('way unknown') && log.includes('<img src=x>'), log);
  assert(await page.locator('#log img, #log script, #log b').count() === 0, 'text stays text');
  await axe(page, 'trouble');
  await page.emulateMedia({ colorScheme: 'dark' });
  await axe(page, 'trouble, dark');
  await look(page);
  // A table that cannot be read is not a table of zeros.
  await page.unroute('**/events*');
  await page.route('**/events*', (route) => route.fulfill({ contentType: 'text/event-stream', body: stream.slice(0, 2).join('') + event('sockets', { at, ready: true, lost: {}, sockets: null }) }));
  await page.reload();
  await page.waitForFunction(() => document.querySelector('.node[data-state=LISTEN] .count.server').textContent.includes('?'));
  assert(await page.locator('#unreadable').isVisible(), 'it is said');
  assert(faults.length === 0, faults.join('\n'));
  await context.close();
}
