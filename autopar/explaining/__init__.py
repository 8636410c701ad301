"""What a report is made of: where time goes, what else could have been, what memory is worth.

`attribution` takes a plan's time apart, `workbench` solves again under another condition,
`alternatives` and `next_best` compare the outcome with the plan, `memory_price` asks what
one more byte would buy, `difference` sets two plans side by side, `text` writes it down.
"""
