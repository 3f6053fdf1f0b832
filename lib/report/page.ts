// The frame of the page: its head, its style and the script that shows the layers of a token. Nothing is loaded.
import { escapeXml } from './svg.js';

export function page(title: string, body: string): string {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>${escapeXml(title)}</title>
<style>
${style}
</style>
</head>
<body>
<main>
${body}
</main>
<script>
${script}
</script>
</body>
</html>
`;
}

// The shades of --heat stay light enough for text to be read on the darkest.
const style = `
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2430;--soft:#5b6675;--line:#d5dbe3;--card:#f5f7fa;--heat:0,114,178;--warn:213,94,0;--focus:#0072b2}
@media (prefers-color-scheme:dark){:root{--bg:#11161d;--ink:#e6ebf2;--soft:#9aa7b8;--line:#2c3644;--card:#18202a;--heat:86,180,233;--focus:#56b4e9}}
*{box-sizing:border-box}
body{background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Open Sans",sans-serif;margin:0;overflow-wrap:anywhere}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.7rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2.2rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}dt{color:var(--soft)}dd{margin:0}
figure{margin:1rem 0}svg{display:block;max-width:100%;height:auto}
.narrow{display:none}
fieldset{border:1px solid var(--line);border-radius:.4rem;padding:.5rem 1rem;margin:1rem 0;min-width:0}
fieldset label{margin:0 1.2rem 0 .3rem}
#axis-time:not(:checked)~.by-time,#axis-flops:not(:checked)~.by-flops{display:none}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;font-weight:400}
thead th,caption{font-weight:600}th:first-child,td:first-child{text-align:left}small{color:var(--soft);font-size:.85em;font-weight:400}
.worst{background:rgba(var(--warn),.22);font-weight:700}.worst small{color:inherit}
.maps{display:flex;flex-wrap:wrap;gap:1.2rem}caption{text-align:left;padding:.3rem 0}
.heat td,.heat th{padding:.15rem .5rem;border:1px solid var(--line)}
.c,.t{background:rgba(var(--heat),calc(.03 + .47*var(--c)))}.c small{color:inherit}.off{box-shadow:inset 0 0 0 2px rgb(var(--warn))}
.samples{position:relative}
.text{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.8rem 1rem;white-space:pre-wrap;line-height:1.8}
.text .t{cursor:default;padding:.15rem 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.prompt{text-decoration:underline dotted;text-underline-offset:.25em}
.none{opacity:.8}
.t[aria-selected=true]{outline:2px solid var(--ink)}
:focus-visible{outline:3px solid var(--focus);outline-offset:2px}
.detail{position:sticky;bottom:0;background:var(--bg);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .8rem;margin-top:.8rem;font-size:.9rem;min-height:6.5rem}
.bits{display:grid;grid-template-columns:5.5rem 1fr;gap:.15rem .5rem;align-items:center;margin-top:.3rem}
.bits div{display:flex;gap:2px;max-width:32rem}.bits i{flex:1;height:.8rem;min-width:1px;border:1px solid rgb(var(--heat));border-radius:2px;display:flex;align-items:end}.bits b{flex:1;background:rgb(var(--heat))}
@media (max-width:640px){.wide{display:none}.narrow{display:block}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}fieldset{padding:.5rem 0;border-width:1px 0;border-radius:0}.scroll tbody th{white-space:normal;min-width:7rem}.scroll td small{display:block}th,td{padding:.3rem .5rem}}
@media print{.detail{display:none}}
`.trim();

// Everything is set as text, never as markup.
const script = `
'use strict';
const detail = document.getElementById('detail');
function element(name, parent, text, kind) {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  if (kind) node.className = kind;
  parent.append(node);
  return node;
}
function layers(bits, shares, experts) {
  const part = (share) => (share === 1 ? '' : ' (' + Math.round(100 * share) + ' % of its ' + experts + ')');
  const ids = [...bits].flatMap((bit, layer) => (bit === '1' ? [layer + part(shares[layer])] : []));
  return ids.length === bits.length && Math.min(...shares) === 1 ? 'all layers' : ids.length === 0 ? 'no layer' : 'layer ' + ids.join(', ');
}
function choose(token) {
  const box = token.parentElement;
  for (const old of document.querySelectorAll('.t[aria-selected=true]')) old.setAttribute('aria-selected', 'false');
  token.setAttribute('aria-selected', 'true');
  box.setAttribute('aria-activedescendant', token.id);
  const { attn, ffn } = token.dataset;
  const entered = [...attn, ...ffn].filter((bit) => bit === '1').length;
  const text = token.classList.contains('none') ? 'no text of its own' : JSON.stringify(token.textContent);
  const place = [...box.children].indexOf(token) + 1 + ' of ' + box.children.length;
  detail.replaceChildren();
  element('strong', detail, text);
  element('span', detail, ', token ' + place + (token.classList.contains('prompt') ? ', prompt' : '') + ': ' + entered + ' of ' + 2 * attn.length + ' sub-layers; layers 0 to ' + (attn.length - 1) + ' from left to right');
  const grid = element('div', detail, '', 'bits');
  for (const [name, bits, experts] of [['attention', attn, 'heads'], ['FFN', ffn, 'blocks']]) {
    const shares = box.dataset[experts].split(',').map(Number);
    element('span', grid, name);
    const row = element('div', grid);
    row.setAttribute('role', 'img');
    row.setAttribute('aria-label', layers(bits, shares, experts));
    [...bits].forEach((bit, layer) => {
      const cell = element('i', row);
      if (bit === '1') element('b', cell).style.height = 100 * shares[layer] + '%';
    });
  }
}
for (const box of document.querySelectorAll('.text')) {
  const show = (event) => {
    const token = event.target.closest('.t');
    if (token) choose(token);
  };
  box.addEventListener('pointerover', show);
  box.addEventListener('click', show);
  box.addEventListener('focus', () => {
    if (!box.querySelector('.t[aria-selected=true]') && box.firstElementChild) choose(box.firstElementChild);
  });
  box.addEventListener('keydown', (event) => {
    const at = box.querySelector('.t[aria-selected=true]') || box.firstElementChild;
    const next = {
      ArrowRight: at && at.nextElementSibling,
      ArrowLeft: at && at.previousElementSibling,
      Home: box.firstElementChild,
      End: box.lastElementChild,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next) {
      choose(next);
      next.scrollIntoView({ block: 'nearest' });
    }
  });
}
`.trim();
