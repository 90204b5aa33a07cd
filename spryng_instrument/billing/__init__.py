"""Bills: what customers owe for what they used.

`plans` is the file of rate plans, `rating` what a quantity costs under one, `bills` the drafts and what is closed,
`behind` the messages that a bill counted, `corrections` what people decide, `texts` how a bill reads, `events` what
other billing systems are fed with.
"""
