"""What other people call our tensors and sizes: a line a kind of tensor, a column a publisher.

# stands for the number of a block and * for weight or bias; names in braces are stacked along the
first axis. `weights` reads every column, `export` writes it.
"""

# ----------------------------------------------------------------------------- images

# ours, Hugging Face's, facebookresearch's and timm's; a block's without what goes before them
IN_ENCODER = ("encoder.blocks.#.", "vit.encoder.layer.#.", "blocks.#.")
IN_DECODER = ("decoder.blocks.#.", "decoder.decoder_layers.#.", "decoder_blocks.#.")
BLOCK = (
    ("norm1.*", "layernorm_before.*", "norm1.*"),
    ("attention.qkv.*", "attention.attention.{query key value}.*", "attn.qkv.*"),
    ("attention.out.*", "attention.output.dense.*", "attn.proj.*"),
    ("norm2.*", "layernorm_after.*", "norm2.*"),
    ("fc1.*", "intermediate.dense.*", "mlp.fc1.*"),
    ("fc2.*", "output.dense.*", "mlp.fc2.*"),
)
VIT = (
    ("encoder.cls_token", "vit.embeddings.cls_token", "cls_token"),
    ("encoder.positions", "vit.embeddings.position_embeddings", "pos_embed"),
    ("encoder.patch.*", "vit.embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
    *(tuple(map(str.__add__, IN_ENCODER, line)) for line in BLOCK),
    ("encoder.norm.*", "vit.layernorm.*", "norm.*"),
    ("decoder.embed.*", "decoder.decoder_embed.*", "decoder_embed.*"),
    ("decoder.mask_token", "decoder.mask_token", "mask_token"),
    ("decoder.positions", "decoder.decoder_pos_embed", "decoder_pos_embed"),
    *(tuple(map(str.__add__, IN_DECODER, line)) for line in BLOCK),
    ("decoder.norm.*", "decoder.decoder_norm.*", "decoder_norm.*"),
    ("decoder.predict.*", "decoder.decoder_pred.*", "decoder_pred.*"),
    ("linear.*", "classifier.*", "head.*"),  # of `finetune.Classifier`
)
# our field -> the entry of Hugging Face's config.json
VIT_FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size",
    "depth": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size",
    "decoder_width": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads", "decoder_mlp": "decoder_intermediate_size",
    "eps": "layer_norm_eps", "dropout": "hidden_dropout_prob"}
# of other tasks
VIT_UNUSED = r"(vit\.pooler\.dense|classifier|head|linear)\.(weight|bias)"

# ----------------------------------------------------------------------------- texts

# ours, Hugging Face's
ROBERTA = (
    ("encoder.word.weight", "roberta.embeddings.word_embeddings.weight"),
    ("encoder.position.weight", "roberta.embeddings.position_embeddings.weight"),
    ("encoder.token_type", "roberta.embeddings.token_type_embeddings.weight"),
    ("encoder.norm.*", "roberta.embeddings.LayerNorm.*"),
    ("encoder.blocks.#.attention.qkv.*",
     "roberta.encoder.layer.#.attention.self.{query key value}.*"),
    ("encoder.blocks.#.attention.out.*", "roberta.encoder.layer.#.attention.output.dense.*"),
    ("encoder.blocks.#.norm1.*", "roberta.encoder.layer.#.attention.output.LayerNorm.*"),
    ("encoder.blocks.#.fc1.*", "roberta.encoder.layer.#.intermediate.dense.*"),
    ("encoder.blocks.#.fc2.*", "roberta.encoder.layer.#.output.dense.*"),
    ("encoder.blocks.#.norm2.*", "roberta.encoder.layer.#.output.LayerNorm.*"),
    ("head.dense.*", "lm_head.dense.*"),
    ("head.norm.*", "lm_head.layer_norm.*"),
    ("head.bias", "lm_head.bias"),
    ("dense.*", "classifier.dense.*"),  # of `finetune.Classifier`
    ("linear.*", "classifier.out_proj.*"),
)
# our field -> the entry of Hugging Face's config.json
ROBERTA_FIELDS = {
    "vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers",
    "heads": "num_attention_heads", "mlp": "intermediate_size",
    "max_positions": "max_position_embeddings", "pad_id": "pad_token_id", "eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob"}
# copies that some files carry, and what other tasks use
ROBERTA_TWINS = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                 "lm_head.decoder.bias": "lm_head.bias"}
ROBERTA_UNUSED = (
    r"roberta\.embeddings\.position_ids|"
    r"(roberta\.pooler\.dense|classifier\.(dense|out_proj)|dense|linear)\.(weight|bias)")
