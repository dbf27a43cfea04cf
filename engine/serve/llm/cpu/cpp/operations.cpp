// The operations of `manta` for tensors on a processor; `kernels.py` builds them. `attend` and `linear` are those that
// `forward` and `linear` have in Python too.

#include <torch/library.h>

#include "attention.h"
#include "decoder.h"
#include "products.h"

TORCH_LIBRARY_FRAGMENT(manta, m) {
  m.def("begin(Tensor[] keys, Tensor[] values, int[] parts, int few) -> ()", manta::begin);
  m.def("pack(Tensor weight) -> Tensor", manta::pack);
  m.def("hold(int number, Tensor packed, Tensor? bias, Tensor? small, Tensor? scale, int outputs) -> ()", manta::hold);
  m.def("release(int number) -> ()", manta::release);
  m.class_<manta::Decoder>("Decoder")
      .def(torch::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<int64_t>, double, double>())
      .def("run", &manta::Decoder::run);
}

TORCH_LIBRARY_IMPL(manta, CPU, m) {
  m.impl("attend", manta::attend);
  m.impl("linear", manta::linear);
}
