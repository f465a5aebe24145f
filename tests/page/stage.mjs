// What the test stands on: processes of the program, a browser, and a page that reports whatever goes wrong in it.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer } from 'node:net';
import { chromium } from 'playwright-core';

/** Only a failing check waits so long. */
export const PATIENCE = 30_000;

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export function assert(holds, what) {
  if (!holds) throw new Error(what);
}

/** Asks again until there is an answer that is not false. */
export async function until(what, ask, patience = PATIENCE) {
  const end = Date.now() + patience;
  for (;;) {
    const answer = await ask();
    if (answer) return answer;
    assert(Date.now() < end, `waited ${patience / 1000} s for ${what}`);
    await sleep(50);
  }
}

/** A port that is free. */
export async function port() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

const running = new Set();

/** Starts the program with its web side on `web`, and waits until it is ready. */
export async function start(binary, web, ...args) {
  const child = spawn(binary, ['--log.format', 'json', '--log.level', 'warn', '--web.listen-address', `127.0.0.1:${web}`, ...args], { stdio: ['ignore', 'ignore', 'pipe'] });
  const gone = once(child, 'exit');
  let log = '';
  child.stderr.on('data', (data) => { log = (log + data).slice(-4000); });
  running.add(child);
  child.on('exit', () => running.delete(child));
  const url = `http://127.0.0.1:${web}`;
  await until(`${args.join(' ')} to be ready`, async () => {
    assert(child.exitCode === null, `it ended: ${log}`);
    return (await fetch(`${url}/-/healthy`).catch(() => null))?.ok;
  });
  return {
    url,
    json: async (path) => (await fetch(url + path)).json(),
    /** The sum of a metric's series. */
    metric: async (name) => {
      const lines = (await (await fetch(`${url}/metrics`)).text()).split('\n');
      const values = lines.filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
      return values.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
    },
    end: async (signal = 'SIGKILL') => {
      child.kill(signal);
      await gone;
    },
  };
}

export function endAll() {
  for (const child of running) child.kill('SIGKILL');
}

export const browse = () => chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--enable-precise-memory-info'],
});

/** Opens the page; what goes wrong in it is in `faults`. While `away` is set, a server that does not answer is no fault. */
export async function open(browser, { url }, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const seen = { faults: [], requests: 0, away: false };
  const fault = (what) => seen.faults.push(what);
  page.on('console', (message) => {
    if (message.type() === 'error' && !(seen.away && /Failed to load resource/.test(message.text()))) fault(`console: ${message.text()}`);
  });
  page.on('pageerror', (error) => fault(`error: ${error.message}`));
  page.on('request', (request) => {
    seen.requests += 1;
    if (!request.url().startsWith(`${url}/`)) fault(`request elsewhere: ${request.url()}`);
  });
  page.on('response', (response) => {
    if (response.status() >= 400 && !seen.away) fault(`${response.status()}: ${response.url()}`);
  });
  await page.exposeFunction('told', fault);
  await page.addInitScript(() => addEventListener('securitypolicyviolation', (event) => window.told(`policy: ${event.violatedDirective} ${event.blockedURI}`)));
  await page.goto(`${url}/`);
  await page.waitForFunction(() => document.body.dataset.feed === 'open' && window.echoscope?.page.census);
  return { page, seen, close: () => context.close() };
}

/** The numbers in the diagram: by state, the client's and the server's. */
export const counts = (page) => page.evaluate(() => Object.fromEntries(
  [...document.querySelectorAll('.node:has([role=button])')].map((node) => [node.dataset.state, ['client', 'server'].map((role) => node.querySelector(`.count.${role}`).textContent.replace(/[^\dkM.]/g, ''))])));
