"""All layouts of quantised matrices in files, by the names that configurations give them."""

from octo_run.models.quantisation import awq, compressed_tensors, fp8, gptq, mx
from octo_run.models.quantisation.stored import Layout

LAYOUTS: dict[str, Layout] = {
    "ct-packed": compressed_tensors.Packed(),
    "ct-plain": compressed_tensors.Plain(),
    "ct-fp4": compressed_tensors.Fp4(),
    "ct-mxfp4": compressed_tensors.Mxfp4(),
    "ct-mxfp8": compressed_tensors.Mxfp8(),
    "gptq": gptq.Gptq(),
    "awq": awq.Awq(),
    "fp8": fp8.Fp8(),
    "blocks": mx.Blocks(),
    "modelopt-fp4": mx.ModelOptFp4(),
}
