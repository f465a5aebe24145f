// The live page in a real browser. Usage: node tests/page/page.mjs PATH/TO/echoscope [--pictures] [--minutes N [--rate R]]
//
// --pictures writes those of the README, to $PICTURES; --minutes N leaves a page open for so long at 1,000 lifecycles a second, or
// at --rate.

import { mkdtempSync, mkdirSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { aLifeIsWalked, announcedToAWatch, axe, countsAreTheApis, filtersAndKeyboard, restartAndFullHouse, stillness, trouble } from './checks.mjs';
import { leftOpen } from './long.mjs';
import { assert, browse, endAll, open, port, sleep, start, until } from './stage.mjs';

const { values: options, positionals: [binary] } = parseArgs({
  allowPositionals: true,
  options: { pictures: { type: 'boolean' }, minutes: { type: 'string' }, rate: { type: 'string', default: '1000' }, shots: { type: 'string' } },
});
const began = Date.now();
const passed = (what) => console.log(`page: ${((Date.now() - began) / 1000).toFixed(0).padStart(3)} s  ${what}`);
const browser = await browse();

/** Screenshots of what is open, at three widths, light and dark. */
async function look(page, dir, name) {
  for (const [width, height] of [[360, 800], [1280, 900], [2560, 1440]]) {
    for (const colorScheme of ['light', 'dark']) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height });
      await sleep(400);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert(wide <= 0, `${name} at ${width}: ${wide} pixels too wide`);
      const path = join(dir, `${name}-${width}-${colorScheme}.png`);
      await page.screenshot({ path, fullPage: true });
      assert(statSync(path).size > 10_000, path);
    }
  }
  await page.setViewportSize({ width: 1280, height: 900 });
  await page.emulateMedia({ colorScheme: 'light' });
}

/** The README's: what fits on a screen. */
async function pictures(page) {
  const dir = process.env.PICTURES;
  mkdirSync(dir, { recursive: true });
  await page.click('.node[data-state=TIME_WAIT]');
  // Nothing is pointed at: what was chosen is shown.
  await page.mouse.move(2, 2);
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width: 1440, height: 900 });
    await sleep(1500);
    await page.locator('main').scrollIntoViewIfNeeded();
    await page.evaluate(() => scrollTo(0, 0));
    await page.screenshot({ path: join(dir, `page-${colorScheme}.png`) });
    await page.locator('.area-ladder:not([hidden])').screenshot({ path: join(dir, `ladder-${colorScheme}.png`) });
  }
  await page.click('.node[data-state=TIME_WAIT]');
}

try {
  if (options.minutes) {
    await leftOpen(browser, binary, [await port(), await port()], Number(options.rate), Number(options.minutes) * 60);
  } else {
    const shots = options.shots ?? mkdtempSync(join(tmpdir(), 'page-'));
    mkdirSync(shots, { recursive: true });
    const pair = await start(binary, await port(), '--observer', 'sock_diag', 'pair', '--listen', `127.0.0.1:${await port()}`, '--connections', '2');
    const watched = await open(browser, pair);
    const itsEnd = await aLifeIsWalked(watched);
    passed('a life walks the arrows, and its ladder is the textbook’s');

    await axe(watched.page, 'a pair, with a ladder');
    await watched.page.emulateMedia({ colorScheme: 'dark' });
    await watched.page.focus('.node[data-state=TIME_WAIT] .hit');
    await watched.page.keyboard.press('Enter');
    await axe(watched.page, 'a pair, dark, with the facts of a state');
    await watched.page.keyboard.press('Enter');
    passed('axe finds nothing serious, light or dark');
    await look(watched.page, shots, 'pair');
    if (options.pictures) await pictures(watched.page);

    const second = await open(browser, pair);
    await filtersAndKeyboard(second);
    await second.close();
    passed('filters, keyboard, pause');
    // Where that is permitted, the kernel tells of every step itself.
    const told = await start(binary, await port(), 'pair', '--listen', `127.0.0.1:${await port()}`);
    const third = await open(browser, told);
    await aLifeIsWalked(third);
    passed(`a life as ${await third.page.textContent('#observer')} tells of it`);
    await third.close();
    await told.end();
    await stillness(browser, pair);
    passed('reduced motion');
    await trouble(browser, pair, (page) => look(page, shots, 'trouble'));
    passed('trouble: warnings, losses, unknown ways, hostile text');

    const watch = await start(binary, await port(), '--observer', 'sock_diag', 'watch', '--remote-port', '9');
    const other = await open(browser, watch);
    await until('the services', async () => await other.page.locator('#services tr').count() >= 1);
    assert(await other.page.locator('#log').isHidden() && await other.page.getByText('Counts only.').isVisible(), 'a watch says that it follows nobody');
    const own = await other.page.locator('#services button').first().textContent();
    await other.page.locator('#services button').first().click();
    assert(await other.page.locator('#service option:checked').textContent() === own, 'one service is chosen');
    await other.page.click('#all');
    await axe(other.page, 'a watch');
    await look(other.page, shots, 'watch');
    assert(other.seen.faults.length === 0, other.seen.faults.join('\n'));
    await other.close();
    await watch.end();
    passed('a watch');
    await announcedToAWatch(browser, binary, (page) => look(page, shots, 'watch-ebpf'));
    passed('a watch, to which the kernel announces each step');

    const lab = await start(binary, await port(), 'lab', 'last-ack-lost', '--hold', '5m');
    const scene = await open(browser, lab);
    await until('a scenario to be shown', async () => scene.page.evaluate(() => document.querySelector('.node[data-state=LAST_ACK] .count.server').textContent.endsWith('1')));
    await until('its lives to be listed', async () => await scene.page.locator('#lives li').count() >= 2);
    assert(scene.seen.faults.length === 0, scene.seen.faults.join('\n'));
    await axe(scene.page, 'a lab');
    await look(scene.page, shots, 'lab');
    await scene.close();
    await lab.end();
    passed('a lab');

    await countsAreTheApis(browser, binary);
    passed('counts are the API’s; one end’s ladder; what a state means');
    await restartAndFullHouse(browser, binary);
    passed('a restart, an end, a full house');
    await itsEnd();
    assert(watched.seen.faults.length === 0, watched.seen.faults.join('\n'));
    passed('TIME_WAIT ran down to CLOSED: all seven states');
    await watched.close();
    await pair.end('SIGTERM');
    await leftOpen(browser, binary, [await port(), await port()], 1000, 60);
    passed('left open: flat');
    console.log(`page: passed; screenshots in ${shots}`);
  }
} catch (error) {
  console.error(`page: ${error.stack}`);
  process.exitCode = 1;
} finally {
  await browser.close();
  endAll();
}
