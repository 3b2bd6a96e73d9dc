"""Dynamic batching, and the promise that whoever is let in hears something in time.

`batcher` is the loop; `pending` decides what runs next, `admission` who may wait, `watch` who has
waited long enough, `outcomes` tells everyone, `vitals` whether the network works at all.
"""
