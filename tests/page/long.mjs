// A page that is left open: its heap and its tree stay as they are, and it stays quick, whatever happens in front of it.

import { assert, open, sleep, start, until } from './stage.mjs';

const MIB = 1024 * 1024;

/** Looks at a pair of `rate` lifecycles a second for so many seconds. */
export async function leftOpen(browser, binary, ports, rate, seconds) {
  const pair = await start(binary, ports[0], 'pair', '--listen', `127.0.0.1:${ports[1]}`, '--connections', '64', '--rate', String(rate), '--duration', `${seconds + 60}s`, '--think-time', '0s', '--close-delay', '0s');
  const { page, seen, close } = await open(browser, pair);
  const devtools = await page.context().newCDPSession(page);
  await page.locator('#lives li').first().click();
  await page.evaluate(() => {
    // How long each frame takes, in which the page can do nothing else.
    window.frames_ = [];
    let last = performance.now();
    const frame = (now) => {
      window.frames_.push(now - last);
      last = now;
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
  const readings = [];
  const opened = async () => pair.metric('echoscope_connections_closed_total');
  const changes = async () => pair.metric('echoscope_tcp_transitions_total');
  // The last minute's TIME_WAITs, five minutes of charts: until then there is something to grow.
  const warm = Math.min(20, seconds / 4);
  await sleep(warm * 1000);
  await page.evaluate(() => { window.frames_ = []; });
  const [began, lives, walked] = [Date.now(), await opened(), await changes()];
  while (Date.now() - began < (seconds - warm) * 1000) {
    await devtools.send('HeapProfiler.collectGarbage');
    const { usedSize } = await devtools.send('Runtime.getHeapUsage');
    const { nodes, jsEventListeners } = await devtools.send('Memory.getDOMCounters');
    readings.push({ at: Math.round((Date.now() - began) / 1000 + warm), heap: usedSize, nodes, listeners: jsEventListeners });
    await sleep(Math.min(5000, seconds * 50));
  }
  const took = (Date.now() - began) / 1000;
  const rates = [((await opened()) - lives) / 2 / took, ((await changes()) - walked) / took];
  const frames = (await page.evaluate(() => window.frames_)).sort((a, b) => a - b);
  const third = Math.ceil(readings.length / 3);
  // What is left of a drawing waits to be collected, and is no growth: the least of several readings is what stays.
  const least = (of, some) => Math.min(...some.map((reading) => reading[of]));
  const [early, late] = [readings.slice(0, third), readings.slice(-third)];
  const told = {
    seconds, lives: Math.round(rates[0]), changes: Math.round(rates[1]),
    heap: [least('heap', early) / MIB, least('heap', late) / MIB].map((n) => n.toFixed(2)),
    nodes: [least('nodes', early), least('nodes', late)],
    frame: { p50: frames[frames.length >> 1]?.toFixed(0), p99: frames[Math.floor(frames.length * 0.99)]?.toFixed(0), most: frames.at(-1)?.toFixed(0) },
    missed: await page.evaluate(() => window.echoscope.page.missed),
  };
  console.log(`page: left open: ${JSON.stringify(told)}`);
  if (process.env.READINGS) console.log(readings.map(({ at, heap, nodes }) => `${at} s ${(heap / MIB).toFixed(2)} MiB ${nodes} nodes`).join('\n'));
  // Charts of five minutes fill up meanwhile: 300 points of a few numbers.
  assert(least('heap', late) < least('heap', early) * 1.05 + MIB / 2, `the heap grows: ${told.heap.join(' to ')} MiB`);
  assert(least('nodes', late) < least('nodes', early) + 1000, `the tree grows: ${told.nodes.join(' to ')} nodes`);
  assert(least('listeners', late) <= least('listeners', early) + 10, 'listeners grow');
  // Usable: what is chosen is shown at once.
  const asked = Date.now();
  await page.click('#pause');
  await page.focus('.node[data-state=TIME_WAIT] .hit');
  assert(await page.textContent('#facts-name') === 'TIME_WAIT' && await page.getAttribute('#pause', 'aria-pressed') === 'true', 'it answers');
  assert(Date.now() - asked < 2000, `it took ${Date.now() - asked} ms to answer`);
  await page.click('#pause');
  // Everything that happened is in its sums, and none of it twice.
  await until('the sums to be those of the process', async () => {
    const [shown, counted] = [await page.evaluate(() => [...window.echoscope.page.totals.values()].reduce((sum, walk) => sum + walk[4], 0)), await changes()];
    return counted >= shown && counted - shown < Math.max(200, rates[1]);
  });
  assert(seen.faults.length === 0, seen.faults.join('\n'));
  await close();
  await pair.end();
}
