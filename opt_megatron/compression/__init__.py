"""Compression of OPT after training: smoothing, pruning and quantisation of the decoder layers, at any layout.

    recipe.py        what is done, as steps: smooth, prune, quantize
    options.py       the options of the command and of `OPT.compress`
    samples.py       calibration samples, drawn as the methods' own programs draw them
    decoder_layer.py one decoder layer, of which a rank holds rows of every matrix
    statistics.py    what the methods need to know of a linear layer's inputs
    apply.py         a recipe's steps on one decoder layer
    compress.py      the pass over all layers, from a checkpoint to a checkpoint
    stored_layers.py where finished layers are kept, for the result and for resuming
    report.py        errors, zeros and times by layer, as JSON, Markdown and a picture

The methods themselves are functions of one matrix and of the statistics of its inputs:

    grid.py          grids of integers, and rounding to nearest
    column_solver.py the elimination, column by column, that GPTQ and SparseGPT share
    gptq.py          quantisation by GPTQ
    sparsegpt.py     pruning by SparseGPT, together with quantisation
    wanda.py         pruning by weights and norms of inputs
    magnitude.py     pruning by weights
    masks.py         which entries are the smallest: of a matrix, of a row, of n in every m
    smoothquant.py   SmoothQuant's factors

"Linears" are k_proj, v_proj, q_proj, out_proj, fc1 and fc2 of a decoder layer. Nothing else of a model is changed, but
the norms or layers before smoothed inputs.
"""
