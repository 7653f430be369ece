// What is wrong with a batch.
#ifndef EMBAX_CORE_FAULTS_H_
#define EMBAX_CORE_FAULTS_H_

#include "core/pack.h"

namespace embax {

// The first fault of a batch of which some task found that it has one: a plain search, since it runs once at most.
PackError FindFault(const PackRequest& request);

}  // namespace embax

#endif  // EMBAX_CORE_FAULTS_H_
