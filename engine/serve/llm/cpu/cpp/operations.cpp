// The operations of `manta` for tensors on a CPU; `kernels.py` builds them. `attend` and `linear` also have an implementation
// in Python, in `model_runner.py` and `linear.py`.

#include <torch/library.h>

#include "attention.h"
#include "decoder.h"
#include "products.h"

TORCH_LIBRARY_FRAGMENT(manta, m) {
  m.def("begin(Tensor[] keys, Tensor[] values, int[] table, int max_row_tokens) -> ()", manta::begin);
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
