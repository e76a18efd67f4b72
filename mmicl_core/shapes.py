"""The letters that tensor names end in, in the order of the axes.

    B   episodes (or prompts) of a batch
    S   demonstrations of an episode, both classes together
    V   visual tokens of one picture
    T   text tokens of one demonstration
    L   tokens of a packed prompt, V + T for a demonstration read alone
    D   width of the language model
    W   width of the vision tower
    H   attention heads
    N   pictures, whatever episode they belong to
    K   neighbours of a concept
    C   concepts

`hidden_BLD` is thus a batch of packed prompts at the width of the language model. A ragged axis is a
list: `states_TD` in a list of one array for each demonstration.
"""
