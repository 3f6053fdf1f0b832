// Stop strings are found across chunk borders, and nothing of them leaks.
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { StopFilter } from '../../lib/infer/engine/stops.js';

test('holds back what may become a stop string', () => {
  const filter = new StopFilter(['</end>']);
  expect(filter.push('hello <')).toEqual({ text: 'hello ', stopped: false });
  expect(filter.push('/en')).toEqual({ text: '', stopped: false });
  expect(filter.push('x')).toEqual({ text: '</enx', stopped: false });
  expect(filter.push('y</end>z')).toEqual({ text: 'y', stopped: true });
});

test('however the text is cut, the result is the text before the first stop string', () => {
  const letters = fc.string({ unit: fc.constantFrom('a', 'b'), maxLength: 12 });
  fc.assert(
    fc.property(
      fc.array(letters),
      fc.array(
        letters.filter((s) => s.length > 0 && s.length < 4),
        { maxLength: 3 },
      ),
      (chunks, stops) => {
        const whole = chunks.join('');
        // A stop string ends the text as soon as it is complete, so the one that ends first wins.
        const filter = new StopFilter(stops);
        let out = '';
        let stopped = false;
        for (const chunk of chunks.flatMap((c) => [...c])) {
          const part = filter.push(chunk);
          out += part.text;
          stopped = part.stopped;
          if (stopped) break;
        }
        if (!stopped) out += filter.end();
        expect(whole.startsWith(out)).toBe(true);
        expect(stops.some((s) => out.includes(s))).toBe(false);
        expect(stopped).toBe(stops.some((s) => whole.includes(s)));
        if (!stopped) expect(out).toBe(whole);
      },
    ),
  );
});
