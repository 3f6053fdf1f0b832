// The page pool: random taking, sharing and releasing keeps count of owners and leaves no page behind.
import { describe, expect, test } from 'vitest';
import { Random } from '../../lib/distill/random.js';
import { PagePool } from '../../lib/infer/engine/pages.js';
import { InternalError } from '../../lib/native/errors.js';

describe('PagePool', () => {
  test('low pages are used first, and again before others', () => {
    const pool = new PagePool(5);
    expect(pool.take(2)).toEqual([0, 1]);
    pool.release([0]);
    expect(pool.take(2)).toEqual([0, 2]);
    expect(pool.free).toBe(2);
  });

  test('a page is free when its last owner lets go', () => {
    const pool = new PagePool(2);
    const [page] = pool.take(1);
    expect(pool.shared(page)).toBe(false);
    pool.share([page]);
    expect(pool.shared(page)).toBe(true);
    pool.release([page]);
    expect([pool.shared(page), pool.free]).toEqual([false, 1]);
    pool.release([page]);
    expect(pool.free).toBe(2);
  });

  test('what cannot be is a defect, not a wrong count', () => {
    const pool = new PagePool(2);
    expect(() => pool.take(3)).toThrow(InternalError);
    expect(() => pool.release([0])).toThrow(InternalError);
    expect(() => pool.share([1])).toThrow(InternalError);
    expect(() => pool.release([7])).toThrow(InternalError);
    expect(pool.free).toBe(2);
  });

  test('random owners of random pages, against plain sets', () => {
    for (let seed = 0; seed < 20; seed++) {
      const random = new Random(seed, 'pages');
      const below = (n: number) => Math.floor(random.uniform() * n);
      const size = 1 + below(40);
      const pool = new PagePool(size);
      const owners: number[][] = [];
      for (let step = 0; step < 400; step++) {
        const action = owners.length > 12 ? 2 : below(3);
        const i = below(owners.length);
        if (action === 0) owners.push(pool.take(below(Math.min(pool.free, 6) + 1)));
        else if (action === 1 && owners.length > 0) {
          const pages = owners[i].slice(0, below(owners[i].length + 1));
          pool.share(pages);
          owners.push(pages);
        } else if (owners.length > 0) pool.release(owners.splice(i, 1)[0]);
        const counts = new Map<number, number>();
        for (const page of owners.flat()) counts.set(page, (counts.get(page) ?? 0) + 1);
        const wrong = [...counts].filter(([page, count]) => pool.shared(page) !== count > 1);
        expect([pool.free, wrong]).toEqual([size - counts.size, []]);
      }
      for (const pages of owners) pool.release(pages);
      expect(pool.free).toBe(size);
    }
  });
});
