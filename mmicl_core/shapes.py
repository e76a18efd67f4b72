"""The letters that tensor names end in, in the order of the axes.

    B   episodes (or prompts) of a batch
    S   demonstrations of an episode, both classes together; also soft tokens, and sets of heads
    V   visual tokens of one picture
    T   text tokens of one demonstration
    L   tokens of a packed prompt, V + T for a demonstration read alone
    D   width of the language model
    R   states of one picture in the vision tower
    W   width of the vision tower
    H   attention heads
    E   width of one head, or of an embedding for retrieval
    Q   learnt queries
    N   pictures, whatever episode they belong to
    K   neighbours of a concept, or layers
    C   concepts

`hidden_BLD` is thus a batch of packed prompts at the width of the language model. A ragged axis is a
list: `states_TD` in a list of one array for each demonstration.
"""
