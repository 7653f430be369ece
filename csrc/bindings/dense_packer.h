// Packs the common kind of batch in one call.
#ifndef EMBAX_BINDINGS_DENSE_PACKER_H_
#define EMBAX_BINDINGS_DENSE_PACKER_H_

#include <nanobind/nanobind.h>

// Adds DensePacker to the module.
void DefineDensePacker(nanobind::module_& m);

#endif  // EMBAX_BINDINGS_DENSE_PACKER_H_
