// The report in a real headless Chromium: it renders, loads nothing, fits a phone and shows the layers of a token.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import type { Browser, BrowserContextOptions, Page } from 'playwright-core';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { reportHtml } from '../../lib/report/index.js';
import { temporaryDirectory } from '../distill/tiny.js';
import { hasBrowser, launchBrowser } from './browser.js';
import { hostile, reportData } from './fixture.js';

const pictures = resolve(import.meta.dirname, '../../build/report');
const phone = { viewport: { width: 360, height: 640 }, hasTouch: true, isMobile: true };
const desktop = { viewport: { width: 1024, height: 768 } };

describe.skipIf(!hasBrowser)('in Chromium', () => {
  let browser: Browser;
  let close: () => Promise<void>;
  let url: string;
  /** What went wrong on the pages of a test: errors, messages on the console, requests. */
  let complaints: string[];
  beforeAll(async () => {
    const file = join(temporaryDirectory(), 'report.html');
    writeFileSync(file, reportHtml(reportData(24)));
    url = pathToFileURL(file).href;
    mkdirSync(pictures, { recursive: true });
    ({ browser, close } = await launchBrowser());
  });
  afterAll(() => close?.());
  afterEach(() => expect(complaints).toEqual([]));

  async function open(options: BrowserContextOptions): Promise<Page> {
    complaints = [];
    const context = await browser.newContext(options);
    await context.route('**', (route) => {
      if (route.request().url() === url) return route.continue();
      complaints.push(`request of ${route.request().url()}`);
      return route.abort();
    });
    const page = await context.newPage();
    page.on('pageerror', (error) => complaints.push(String(error)));
    page.on('console', (message) => complaints.push(message.text()));
    page.on('dialog', (dialog) => complaints.push(dialog.message()));
    await page.goto(url);
    return page;
  }
  const picture = (page: Page, name: string) => page.screenshot({ path: join(pictures, `${name}.png`) });

  test('renders: charts drawn, hostile text shown as text', async () => {
    const page = await open(desktop);
    expect(await page.title()).toContain('Elastic a<b>&"\'\ufffd\ufffd</svg></style><script>alert(1)</script>');
    const charts = page.locator('svg:visible');
    expect(await charts.count()).toBe(6);
    for (const chart of await charts.all()) {
      const box = await chart.boundingBox();
      expect(box!.width).toBeGreaterThan(300);
      expect(box!.height).toBeGreaterThan(100);
    }
    expect(await page.locator('.heat tbody tr').count()).toBe(48);
    const trace = reportData(24).samples[0].trace.tokens;
    const shown = await page.locator('.text').first().locator('.t').allTextContents();
    // What no document may contain is replaced; a token without text of its own is a dot.
    expect(shown).toEqual(trace.map((t) => (t === '' ? '·' : t.replace('\u0000\ud800', '\ufffd\ufffd'))));
    await picture(page, 'light');
    await page.context().close();
  });

  test.each([360, 320])(
    'at %d pixels nothing makes the page scroll sideways, and text stays readable',
    async (width) => {
      const page = await open({ ...phone, viewport: { width, height: 640 } });
      expect(await page.evaluate('document.documentElement.scrollWidth')).toBe(width);
      const smallest = await page.evaluate(`Math.min(...[...document.querySelectorAll('svg')]
      .filter((svg) => svg.getBoundingClientRect().width > 0)
      .map((svg) => (12 * svg.getBoundingClientRect().width) / svg.viewBox.baseVal.width))`);
      expect(smallest).toBeGreaterThan(10);
      // Wide tables scroll by themselves.
      for (const region of await page.locator('.scroll').all())
        expect((await region.boundingBox())!.width).toBeLessThanOrEqual(width);
      await picture(page, 'phone');
      await page.context().close();
    },
  );

  test('the switch shows quality over measured time', async () => {
    const page = await open(desktop);
    expect(await page.locator('.by-flops').isVisible()).toBe(true);
    await page.getByLabel('measured time').check();
    expect(await page.locator('.by-flops').isVisible()).toBe(false);
    expect(await page.locator('.by-time svg:visible').count()).toBe(2);
    await page.keyboard.press('ArrowLeft');
    expect(await page.locator('.by-flops').isVisible()).toBe(true);
    await page.context().close();
  });

  test('pointing at a token shows its layers', async () => {
    const page = await open(desktop);
    await page.locator('#s1t2').hover();
    const detail = page.locator('#detail');
    expect(await detail.textContent()).toContain('" whale", token 3 of');
    expect(await detail.locator('i').count()).toBe(48);
    // (2 + layer + place) is a multiple of 3
    expect(await detail.locator('i > b').count()).toBe(16);
    expect(await detail.getByRole('img').first().getAttribute('aria-label')).toBe(
      'layer 1, 4 (25 % of its heads), 7, 10, 13, 16, 19, 22',
    );
    expect(await detail.getByRole('img').last().getAttribute('aria-label')).toBe(
      'layer 0, 3 (50 % of its blocks), 6, 9, 12, 15, 18, 21',
    );
    const heights = await detail.locator('i > b').evaluateAll((all) => all.map((b) => b.clientHeight));
    expect(Math.min(...heights)).toBeCloseTo(Math.max(...heights) / 4, -1);
    expect(new Set(heights).size).toBe(3);
    await page.locator('#s1t1').hover();
    expect(await detail.locator('strong').textContent()).toBe(
      JSON.stringify(hostile.replace('\u0000\ud800', '\ufffd\ufffd')),
    );
    await page.context().close();
  });

  test('the keyboard moves through the tokens of a text', async () => {
    const page = await open(desktop);
    const chosen = () => page.locator('.t[aria-selected=true]').getAttribute('id');
    await page.getByRole('listbox').nth(1).focus();
    expect(await chosen()).toBe('s1t0');
    for (const [key, id] of [
      ['ArrowLeft', 's1t0'],
      ['ArrowRight', 's1t1'],
      ['ArrowRight', 's1t2'],
      ['ArrowLeft', 's1t1'],
      ['End', `s1t${reportData().samples[1].trace.tokens.length - 1}`],
      ['Home', 's1t0'],
    ]) {
      await page.keyboard.press(key);
      expect(await chosen()).toBe(id);
    }
    expect(await page.getByRole('listbox').nth(1).getAttribute('aria-activedescendant')).toBe('s1t0');
    expect(await page.locator('#detail').textContent()).toContain('no text of its own');
    await page.context().close();
  });

  test('a tap shows the layers on a phone, with the token still in sight', async () => {
    const page = await open(phone);
    const token = page.locator('#s0t9');
    await token.tap();
    const detail = page.locator('#detail');
    expect(await detail.textContent()).toContain('token 10 of');
    const [panel, at] = [await detail.boundingBox(), await token.boundingBox()];
    expect(panel!.y + panel!.height).toBeLessThanOrEqual(640);
    expect(at!.y + at!.height).toBeLessThanOrEqual(panel!.y);
    await picture(page, 'phone-token');
    await page.context().close();
  });

  test.each(['light', 'dark'] as const)('text has contrast in the %s scheme', async (colorScheme) => {
    const page = await open({ ...desktop, colorScheme });
    await page.locator('#s0t5').hover();
    const worst = await page.evaluate(contrast);
    expect(worst).toMatchObject({ ratio: expect.any(Number) });
    expect((worst as { ratio: number }).ratio, JSON.stringify(worst)).toBeGreaterThan(4.5);
    if (colorScheme === 'dark') await picture(page, 'dark');
    await page.context().close();
  });
});

// The least contrast (WCAG) of an element that holds text against the backgrounds it lies on.
const contrast = `(() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const over = (top, below) => top.rgb.map((c, i) => c * top.a + below[i] * (1 - top.a));
  const ground = (e) => (e ? over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255]);
  const luminance = (rgb) =>
    rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const all = [...document.querySelectorAll('body *')].filter(
    (e) => !e.closest('svg') && e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return all.map((e) => {
    const below = ground(e);
    const [a, b] = [luminance(over(parse(getComputedStyle(e).color), below)), luminance(below)];
    return { ratio: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text: e.textContent.slice(0, 40), kind: e.className };
  }).sort((a, b) => a.ratio - b.ratio)[0];
})()`;
