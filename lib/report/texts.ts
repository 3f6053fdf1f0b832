// Sample texts, every token coloured by the share of the model's sub-layers it entered.
import { percent } from './format.js';
import { escapeXml } from './svg.js';
import type { Sample, SampleTrace } from './types.js';

/** The samples and the panel that shows one token's sub-layers; the script of the page fills it. */
export function sampleTexts(samples: readonly Sample[]): string {
  if (samples.length === 0) return '';
  const scale = [0, 0.25, 0.5, 0.75, 1].map((c) => `<span class="t" style="--c:${c}">${c * 100} %</span>`).join(' ');
  return `<p id="how">Background: the share of attention and FFN sub-layers a token entered, ${scale}; the prompt is underlined. Point at a token or tap it, or focus a text and use the arrow keys, to see its layers.</p>
<div class="samples">${samples.map(sampleText).join('\n')}
<div class="detail" id="detail" role="status">No token chosen.</div></div>`;
}

function sampleText(sample: Sample, s: number): string {
  const { trace } = sample;
  const [attn, mlp] = [bits(trace.attn, trace), bits(trace.mlp, trace)];
  const tokens = trace.tokens.map((text, t) => {
    const times = (bits: string, used: readonly number[]) => [...bits].map((bit, l) => Number(bit) * used[l]);
    const weights = [...times(attn[t], trace.headShare), ...times(mlp[t], trace.blockShare)];
    const entered = weights.reduce((a, b) => a + b, 0) / weights.length;
    const kind = `t${t < trace.promptTokens ? ' prompt' : ''}${text === '' ? ' none' : ''}`;
    // A token without text of its own (special, or part of a character) still has a place.
    const piece = text === '' ? '·' : escapeXml(text);
    return `<span class="${kind}" role="option" aria-selected="false" id="s${s}t${t}" style="--c:${Number(entered.toFixed(3))}" data-attn="${attn[t]}" data-ffn="${mlp[t]}">${piece}</span>`;
  });
  const label = escapeXml(sample.label);
  const list = (shares: readonly number[]) => shares.map((share) => Number(share.toFixed(3))).join();
  return `<h3>${label} <small>${percent(sample.ratio)} of the FLOPs</small></h3>
<div class="text" role="listbox" tabindex="0" aria-label="Tokens at ${label}" aria-describedby="how" data-heads="${list(trace.headShare)}" data-blocks="${list(trace.blockShare)}">${tokens.join('')}</div>`;
}

/** A string of 0 and 1 for every token, one for each layer. */
function bits(base64: string, { tokens, layers }: SampleTrace): string[] {
  const bytes = Buffer.from(base64, 'base64');
  return tokens.map((_, t) => Array.from({ length: layers }, (_, l) => (bytes[t * layers + l] ? '1' : '0')).join(''));
}
