"""The style sheet of the page, served as /style.css."""

STYLE = """\
:root {
  color-scheme: light dark;
  --back: #f5f5f2; --paper: #ffffff; --text: #1b1d20; --quiet: #5a6068; --line: #e2e2dd; --room: #ebebe6;
  --link: #1a56a8; --calm: #4a72a8; --fine: #2f8a5b; --own: #c98a16; --upstream: #8a7fb8; --wrong: #c8453b;
  --good: #17683f; --good-back: #e4f2e9; --warn: #7a4d00; --warn-back: #fbefd5; --bad: #a3241b; --bad-back: #fbe6e3;
  --mono: ui-monospace, "SFMono-Regular", "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #101214; --paper: #181b1e; --text: #e4e6e8; --quiet: #9ba3ab; --line: #2a2e33; --room: #2a2e33;
    --link: #83b4f5; --calm: #6f9bd6; --fine: #45a873; --own: #d9a03a; --upstream: #9d92cf; --wrong: #e0675d;
    --good: #7ed6a3; --good-back: #14291f; --warn: #eec06a; --warn-back: #2e2413; --bad: #ff9d94; --bad-back: #341917;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 0 24px 48px; max-width: 1400px; background: var(--back); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1, h2, h3, p, ul, dl, dd { margin: 0; padding: 0; }
h1 { font-size: 17px; font-weight: 600; }
h2 { font-size: 15px; font-weight: 600; margin: 28px 0 8px; }
h3 { font-size: 13px; font-weight: 500; color: var(--quiet); }
small { font-size: 12px; color: var(--quiet); }
a { color: var(--link); }
bdi { direction: ltr; unicode-bidi: isolate; }
code { font-family: var(--mono); font-size: 12.5px; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
.aside { color: var(--quiet); font-size: 13px; }

header { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 20px; padding: 16px 0 14px; }
.brand { color: var(--quiet); font-weight: 500; }
.clock { color: var(--quiet); font-size: 13px; }
form { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin-left: auto; }
form label { color: var(--quiet); font-size: 13px; }
input, button {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--quiet); border-radius: 6px;
  padding: 5px 10px; min-height: 34px;
}
input { width: 260px; font-family: var(--mono); font-size: 13px; }
input::placeholder { color: var(--quiet); opacity: 1; }
button { cursor: pointer; font-weight: 500; }

.state { border-radius: 8px; padding: 14px 18px; border-left: 5px solid; }
.state h2 { margin: 0; font-size: 20px; }
.state.good { background: var(--good-back); color: var(--good); }
.state.bad { background: var(--bad-back); color: var(--bad); }
.state ul { list-style: none; margin-top: 6px; color: var(--text); }
.state li { padding: 2px 0; }
.state div li { font-size: 13px; }
.state h3 { margin-top: 10px; color: inherit; font-weight: 600; }
.state div ul { margin-top: 0; }
@media (min-width: 1001px) {
  .state.bad { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 32px; }
  .state.bad h2 { grid-column: 1 / -1; }
  .state h3 { margin-top: 8px; }
}

.tiles { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 12px; }
.tile, .panel, .facts dl { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px 10px; display: flex; flex-direction: column; }
.figure { font-size: 26px; line-height: 1.2; font-weight: 600; letter-spacing: -0.01em; }
.note { font-size: 12.5px; color: var(--quiet); min-height: 2.9em; }
.chart { display: block; width: 100%; height: 44px; margin-top: auto; }
.axis {
  display: flex; justify-content: space-between; gap: 8px; font-size: 11.5px; color: var(--quiet); margin-top: 4px;
}
.base { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.calm { fill: var(--calm); } .fine { fill: var(--fine); } .own { fill: var(--own); }
.upstream { fill: var(--upstream); } .wrong { fill: var(--wrong); }
.key { white-space: nowrap; margin-right: 6px; }
.key::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin-right: 5px; }
.key.upstream::before { background: var(--upstream); }
.key.own::before { background: var(--own); }

.facts h2 { display: inline-block; margin-right: 10px; }
.facts .aside { display: inline-block; }
.facts dl { display: flex; flex-wrap: wrap; gap: 8px 28px; padding: 12px 16px; }
.facts dt { font-size: 12px; color: var(--quiet); }
.facts dd { font-size: 13.5px; }

.panel { overflow-x: auto; }
.panel + .aside { margin-top: 6px; }
table { width: 100%; border-collapse: collapse; font-size: 13px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { font-size: 12px; font-weight: 500; color: var(--quiet); white-space: nowrap; }
tbody th { font-weight: 400; }
.number { text-align: right; font-family: var(--mono); font-size: 12.5px; white-space: nowrap; }
thead .number { font-family: inherit; font-size: 12px; }
.badge {
  display: inline-block; padding: 0 8px; border-radius: 9px; font-size: 12px; line-height: 19px; font-weight: 500;
  white-space: nowrap;
}
.badge.good { color: var(--good); background: var(--good-back); }
.badge.warn { color: var(--warn); background: var(--warn-back); }
.badge.bad { color: var(--bad); background: var(--bad-back); }
.result { padding: 12px 12px 6px; }
.result.good { color: var(--good); } .result.warn { color: var(--warn); }
section.panel { margin-top: 16px; } section.panel h2 { margin: 12px 12px 0; } .panel .panel { border: 0; }

.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 16px; }
.bar { display: block; width: 100%; min-width: 60px; height: 8px; margin-top: 6px; border-radius: 4px; }
.gauge { width: 35%; }
.bar .room { fill: var(--room); } .bar .good { fill: var(--calm); }
.bar .warn { fill: var(--own); } .bar .bad { fill: var(--wrong); }

.limits code { white-space: nowrap; }
.events td, .events th { font-family: var(--mono); font-size: 12px; }
.events thead th { font-family: inherit; }
table.events { table-layout: fixed; }
.events th:nth-child(1) { width: 84px; }
.events th:nth-child(2) { width: 112px; }
.events th:nth-child(4) { width: 15%; }
.events th:nth-child(5) { width: 15.5%; }
.events th:nth-child(6) { width: 34%; }
.events small { display: block; font-size: 11.5px; }
.events .badge, .events .who { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.events td, .events tbody th { overflow: hidden; }
.to::before { content: "\\2192\\a0"; color: var(--quiet); }

@media (max-width: 1000px) {
  .tiles { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .tile { grid-column: span 3; }
  .tile:nth-child(n + 3) { grid-column: span 2; }
  .pair { grid-template-columns: minmax(0, 1fr); }
}

/* A phone, a small tablet: each row of a table is a card, and each cell bears the name of its column. */
@media (max-width: 900px) {
  body { padding: 0 12px 32px; }
  h2 { margin-top: 22px; }
  form { margin: 0; width: 100%; }
  form label { width: 100%; margin-bottom: -4px; }
  input { flex: 1; min-width: 0; width: auto; font-size: 16px; min-height: 40px; }
  button { min-height: 40px; }
  .state { padding: 12px 14px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
  .tile, .tile:nth-child(n + 3) { grid-column: auto; padding: 10px 12px 8px; }
  .tile:first-child { grid-column: span 2; }
  .tile:first-child .note { min-height: 0; }
  .key { display: block; white-space: normal; margin-right: 0; }
  .axis span:first-child { display: none; }
  .facts dl { gap: 8px 20px; padding: 10px 12px; }
  table, tbody { display: block; }
  thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 4px 10px; padding: 10px 12px; }
  tr { border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  tbody th, tbody td { display: block; padding: 0; border: 0; text-align: left; min-width: 0; }
  tbody td.number { text-align: left; white-space: normal; }
  td::before { content: attr(data-label); display: block; font: 11.5px/1.4 system-ui, sans-serif; color: var(--quiet); }
  td.none { display: none; }
  tbody th, td.long, .answer td:nth-child(2), .certificates td { grid-column: 1 / -1; }
  .answer tr { gap: 2px 10px; }
  .answer tbody th { color: var(--quiet); }
  .answer td:nth-child(3) { grid-column: span 2; }
  .answer td:nth-child(3)::before { display: inline; content: "\\2192\\a0"; }
  .answer td:nth-child(2)::before, .answer td:nth-child(4)::before, .certificates td::before { display: none; }
  .answer tbody td:nth-child(4) { text-align: right; color: var(--quiet); }
  .number small { white-space: nowrap; }
  .badge { white-space: normal; }
  .hosts tbody th, .tables tbody th { grid-column: span 2; }
  .hosts td:nth-child(2), .tables td:nth-child(2) { text-align: right; }
  .hosts td:nth-child(2)::before, .tables td:nth-child(2)::before, .events td::before, .gauge::before { display: none; }
  td.gauge { width: auto; align-self: end; padding-bottom: 6px; }
  .events tr { grid-template-columns: max-content minmax(0, 1fr); gap: 3px 12px; }
  .events tbody th:first-child { grid-column: auto; white-space: nowrap; width: auto; }
  .events th small { display: inline; margin-left: 10px; }
  .events td:nth-child(2) { text-align: right; }
  .events td:nth-child(2) small, .events td:nth-child(4) *, .events td:nth-child(5) * { display: inline; }
  .events td small { margin-left: 6px; }
  .events td:nth-child(n + 4) { grid-column: 1 / -1; }
  .events td:nth-child(6) { order: 1; }
  .events td:nth-child(6) small { margin-left: 0; }
  .events td:nth-child(4), .events td:nth-child(5) { order: 2; color: var(--quiet); }
}
"""
