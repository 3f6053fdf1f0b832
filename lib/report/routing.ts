// The router heat map: for every budget a table of layers and places, share of tokens processed against its target.
import { budgetName } from './format.js';
import { escapeXml } from './svg.js';
import type { RouterMap } from './types.js';

/** A share further than this from its target is marked. */
const tolerance = 0.1;

export function routerMaps(maps: readonly RouterMap[]): string {
  return `<div class="maps">${maps.map(routerMap).join('\n')}</div>`;
}

function routerMap({ budget, measured, target }: RouterMap): string {
  const rows = measured.attn.map(
    (_, l) =>
      `<tr><th scope="row">${l}</th>${cell(measured.attn[l], target.attn[l])}${cell(measured.mlp[l], target.mlp[l])}</tr>`,
  );
  return `<table class="heat"><caption>${escapeXml(budgetName(budget))}</caption>
<thead><tr><th scope="col">layer</th><th scope="col">attention</th><th scope="col">FFN</th></tr></thead>
<tbody>${rows.join('\n')}</tbody></table>`;
}

function cell(share: number, target: number | null): string {
  const off = target !== null && Math.abs(share - target) > tolerance;
  const note = target === null ? 'no router' : `target ${whole(target)}${off ? ', off' : ''}`;
  return `<td class="c${off ? ' off' : ''}" style="--c:${share.toFixed(3)}">${whole(share)} % <small>${note}</small></td>`;
}

const whole = (share: number): string => String(Math.round(share * 100));
