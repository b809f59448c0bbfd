"""Style sheet of all HTML reports: light and dark, from telephones to wide screens, and for paper."""

CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6573; --line: #dfe3e8; --page: #f6f7f9; --card: #fff;
  --accent: #0072b2; --alarm: #b4540a; --code: #eceff3; --run: 0 114 178;
  --series-0: #0072b2; --series-1: #e69f00; --series-2: #009e73; --series-3: #cc79a7; --series-4: #56b4e9;
  --series-5: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #a4aebb; --line: #343d49; --page: #11151b;
  --card: #1a2028; --accent: #5cb3ea; --alarm: #f2a65a; --code: #232b35; --run: 20 130 200;
  --series-0: #3d9fe0; --series-1: #e8ae38; --series-2: #2fbf95; --series-3: #d990ba; --series-4: #a5d6f5;
  --series-5: #ee7f3b; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: var(--page); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, Helvetica, Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 68rem; margin: 0 auto; padding: 2.2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p.lead { color: var(--soft); margin: 0 0 1.5rem; }
p.headline { font-size: 1.15rem; margin: 0 0 1.2rem; }
p.small { color: var(--soft); font-size: .9rem; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0;
  overflow-x: auto; }
.card { padding: .3rem .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; line-height: 1.25;
  min-width: 4.5rem; }
td { white-space: nowrap; }
td.across { white-space: normal; text-align: left; color: var(--soft); }
td.across span { display: block; max-width: min(40rem, 50vw); }
tr:last-child td { border-bottom: 0; }
th.left, td.left { text-align: left; white-space: normal; min-width: 9rem; }
td.left { overflow-wrap: anywhere; }
.pinned th:first-child, .pinned td:first-child { position: sticky; left: -.8rem; background: var(--card); }
figure { padding: .8rem .6rem; }
figure svg { display: block; margin: 0 auto; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; text-align: center; position: sticky; left: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
pre, .text { white-space: pre-wrap; margin: .4rem 0; }
pre { background: var(--code); padding: .8rem 1rem; border-radius: 8px; font-size: .88rem; }
.note, .warning { border-left: 4px solid var(--accent); background: var(--card); padding: .6rem 1rem; margin: 1rem 0; }
.warning { border-color: var(--alarm); }
.warning ul { margin: 0; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: .8rem 0;
  padding: 0 1rem; }
summary { cursor: pointer; margin: 0 -1rem; padding: .6rem 1rem; font-weight: 600; }
details .card { border-width: 1px 0 0; border-radius: 0; margin: 0 -1rem .5rem; }
details p:last-child { padding-bottom: .8rem; }
.text { font-size: .92rem; }
.asked { color: var(--soft); border-left: 3px solid var(--line); padding-left: .8rem; max-height: 12rem;
  overflow-y: auto; }
.run { border-radius: 3px; box-shadow: -1px 0 0 var(--card); }
.n2 { background: rgb(var(--run) / .16); } .n3 { background: rgb(var(--run) / .27); }
.n4 { background: rgb(var(--run) / .38); } .n5 { background: rgb(var(--run) / .49); }
.n6 { background: rgb(var(--run) / .6); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; font-size: .9rem; color: var(--soft); }
.legend .run { padding: 0 .5rem; color: var(--ink); border: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 34rem) { main { padding: 1.2rem .75rem 3rem; } h1 { font-size: 1.4rem; }
  p.headline { font-size: 1.05rem; } .card { padding: .2rem .5rem; } figure { padding: .6rem .4rem; }
  .pinned th:first-child, .pinned td:first-child { left: -.5rem; } th, td { padding: .4rem .45rem; }
  .card:not(.pinned) .left { min-width: 6.5rem; } dl { display: block; } dd { margin: 0 0 .5rem; } }
@media print { body { background: none; } .card, figure, details { break-inside: avoid; } }
"""
