"""The frame of the report: its headings and its style."""

HEADINGS = {
    "scores": (
        "Scores",
        (
            "On held-out files, before training and at the best checkpoint. A gain is after minus"
            " before, positive where it is better; its interval comes from the paired differences"
            " of the examples."
        ),
    ),
    "memory_by_part": (
        "Memory by part",
        (
            "Of the fullest worker; parks are in host memory. The other methods are computed for"
            " the same strategy and weights, from the bytes that this run took for each parameter"
            " in training; their activations, which are more, are not counted."
        ),
    ),
    "loss_by_layer": (
        "Loss",
        "The active layer as coloured bands behind the curve, and as a row of its own below.",
    ),
    "memory": (
        "Memory over time",
        (
            "Of the fullest worker. On GPUs up to the peak, with a dashed line for what full"
            " fine-tuning would need at least: gradients and optimizer state of all layers, and"
            " the activations of this run."
        ),
    ),
    "layers_by_loss_drop": (
        "Layers by loss drop",
        (
            "A bar is the mean over a layer's visits, a dot one visit; colours follow the depth,"
            " blue for the first layer."
        ),
    ),
    "visits": (
        "Visits",
        (
            "Means over the visits. Loss drop: the fall, over a visit, of the straight line through"
            " its training losses."
        ),
    ),
    "completions": (
        "Completions",
        "Held-out examples before and after; right answers are marked.",
    ),
    "configuration": ("Configuration", ""),
}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root { color-scheme: light dark; --ink: #1f2430; --soft: #6b7280; --line: #e5e7eb;
  --back: #f6f7f9; --card: #fff; --tag: #e7e9ee; --good: #14713a; --good-back: #dcf5e4;
  --bad: #a51d1d; --bad-back: #fde3e3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ee; --soft: #9aa1ad; --line: #33363c; --back: #101114; --card: #191919;
    --tag: #33363c; --good: #7fdba3; --good-back: #143d25; --bad: #f5a3a3; --bad-back: #4a1a1a }
  /* Pictures are drawn on white: inverted they stand on the card, and keep their hues. */
  section svg { filter: invert(0.9) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px }
header { padding-top: 36px }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere }
h1 span { font-size: 12px; font-weight: 600; vertical-align: 5px; margin-left: 10px;
  padding: 3px 9px; border-radius: 99px; background: var(--tag); letter-spacing: 0.04em }
h1 span.FINISHED, .gained, mark { background: var(--good-back); color: var(--good) }
h1 span.FAILED, .lost { background: var(--bad-back); color: var(--bad) }
header p { color: var(--soft); margin: 4px 0 22px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px }
.card, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.card { padding: 13px 16px } .label, .remark { color: var(--soft); font-size: 13px }
.value { font-size: 24px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums }
section { margin: 16px 0; padding: 20px 24px }
h2 { font-size: 18px; margin: 0 }
section > p { color: var(--soft); margin: 2px 0 14px; max-width: 80ch }
section svg { width: 100%; height: auto; display: block }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif !important }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: 13px; font-weight: 600; color: var(--soft) }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
.figures td:nth-child(n+2), .figures th:nth-child(n+2) { text-align: right;
  font-variant-numeric: tabular-nums }
.names td { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
.code { table-layout: fixed }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Consolas, monospace }
.context { border: 0; color: var(--soft); padding: 12px 12px 0 0 }
.context b { padding: 1px 7px; border-radius: 99px; background: var(--tag); margin-right: 4px }
.context b.gained { background: var(--good-back) } .context b.lost { background: var(--bad-back) }
.answers td { padding-bottom: 12px }
mark { border-radius: 3px }
summary { cursor: pointer; color: var(--soft) }
@media (max-width: 640px) {
  header, main { padding: 0 10px }
  section { padding: 14px 12px }
  .cards { grid-template-columns: 1fr 1fr }
  #scores table { font-size: 12px } #scores th, #scores td { padding-right: 6px }
  section svg { min-width: 600px }
  .code thead { display: none }
  .code td { display: block; border: 0; padding: 2px 0 }
  .answers td { display: flex; gap: 8px; padding-bottom: 2px }
  .answers td::before { content: attr(data-label); flex: 0 0 64px; color: var(--soft);
    font-size: 13px }
  .answers { border-bottom: 1px solid var(--line) }
}
</style></head><body>
<header><h1>$name<span class="$status">$status</span></h1><p>$facts</p></header>
<main><div class="cards">$cards</div>
$sections
</main></body></html>
"""
