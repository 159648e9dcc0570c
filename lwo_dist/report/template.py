"""The frame of the report: its headings and its style."""

HEADINGS = {
    "loss_by_layer": (
        "Loss",
        "The active layer as coloured bands behind the curve, and as a row of its own below.",
    ),
    "memory": (
        "Memory",
        (
            "Of the fullest worker. The dashed line is what full fine-tuning would need with the"
            " same strategy: gradients and optimizer state of all layers. Its activations, which"
            " are more, are not counted."
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
        "Held-out examples before and after; answers that are right to the letter are marked.",
    ),
    "configuration": ("Configuration", ""),
}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root { --ink: #1f2430; --soft: #6b7280; --line: #e5e7eb; --back: #f6f7f9; }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px }
header { padding-top: 36px }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere }
h1 span { font-size: 12px; font-weight: 600; vertical-align: 5px; margin-left: 10px;
  padding: 3px 9px;
  border-radius: 99px; background: #e7e9ee; color: #4b5563; letter-spacing: 0.04em }
h1 span.FINISHED { background: #dcf5e4; color: #14713a }
h1 span.FAILED { background: #fde3e3; color: #a51d1d }
header p { color: var(--soft); margin: 4px 0 22px }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: 10px }
.card { padding: 13px 16px } .label, .remark { color: var(--soft); font-size: 13px }
.value { font-size: 24px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums }
section { margin: 16px 0; padding: 20px 24px }
h2 { font-size: 18px; margin: 0 }
section > p { color: var(--soft); margin: 2px 0 14px; max-width: 80ch }
section > svg { width: 100%; height: auto; display: block }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif !important }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: 13px; font-weight: 600; color: var(--soft) }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
.figures td:nth-child(n+2), .figures th:nth-child(n+2) { text-align: right;
  font-variant-numeric: tabular-nums }
.names td { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
.code { table-layout: fixed; min-width: 720px }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Consolas, monospace }
.context { border: 0; color: var(--soft); padding: 12px 12px 0 0 }
.answers td { padding-bottom: 12px }
mark { background: #dcf5e4; color: #14713a; border-radius: 3px }
summary { cursor: pointer; color: var(--soft) }
</style></head><body>
<header><h1>$name<span class="$status">$status</span></h1><p>$facts</p></header>
<main><div class="cards">$cards</div>
$sections
</main></body></html>
"""
