"""One whole page as all reports have it, light or dark, without scripts or links. Pure."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --faint: #d9dee3;
  --training: #bcd9c4; --repairing: #f2c879; --lost: #e39a94; --joining: #a9c4e8; --line: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #15181b; --faint: #3a4148;
  --training: #2f5a3d; --repairing: #8a6414; --lost: #8a3a34; --joining: #2b4c7a; --line: #6fb0ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.pass { color: #1c8a43; } .fail { color: #cf3a30; } .unknown { color: #a87500; }
table { border-collapse: collapse; } td { padding: .2rem 1.5rem .2rem 0; vertical-align: top; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg text.small { font-size: 10px; }
.grid { stroke: var(--faint); } .fault { stroke: #cf3a30; stroke-dasharray: 4 3; }
.undisturbed { fill: none; stroke: var(--faint); stroke-width: 6; stroke-linejoin: round; }
.disturbed { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round; }
.heat { fill: #c2410c; }
.commit { stroke: var(--ink); stroke-width: 1.5; }
rect.training, i.training { fill: var(--training); background: var(--training); }
rect.repairing, i.repairing { fill: var(--repairing); background: var(--repairing); }
rect.lost, i.lost { fill: var(--lost); background: var(--lost); }
rect.joining, i.joining { fill: var(--joining); background: var(--joining); }
rect.memory, i.memory { fill: var(--joining); background: var(--joining); }
rect.codec, i.codec { fill: var(--training); background: var(--training); }
rect.write, i.write { fill: var(--line); background: var(--line); }
rect.fsync, i.fsync { fill: var(--repairing); background: var(--repairing); }
rect.commit, i.commit { fill: var(--lost); background: var(--lost); }
i { display: inline-block; width: 1em; height: .8em; margin: 0 .3em 0 1em; }
"""


def html_page(title: str, body: str, *, style: str = "") -> str:
    """The page with this body, which is HTML; `style` comes after `STYLE`, and overrules it."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>
{body}
</body></html>
"""
