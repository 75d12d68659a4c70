// The multi-tensor operations of the CPU backend. One set of them is compiled for each instruction set; all give the
// same bits, because the lanes of every sum are fixed and multiplications and additions are never contracted.
#pragma once

#include "../common/bases.h"
#include "../common/elementwise.h"
#include "../common/rules.h"
#include "schedule.h"

namespace samk {

struct Launch {
    const Row* rows = nullptr;
    const Schedule* schedule = nullptr;

    int lists = 0;
    RuleArguments rule;
    bool needs_gram = false;
    bool weighted_gram = true;      // measure the lists in the rows' geometry
    const double* scale = nullptr;  // [group][list], multiplies the rule's coefficients

    double* partials = nullptr;      // [chunk][kMaxPairs]
    double* gram = nullptr;          // [kMaxLists][kMaxLists]
    double* coefficients = nullptr;  // [kMaxLists], before the scales
    bool finite = true;

    // Write-only results bypass the cache where the launch is larger than the cache.
    bool streaming = false;

    // ascent, perturb, restore, descent: SnapshotFlag of each row
    uint8_t* taken = nullptr;
    bool take_snapshot = false;

    // descent
    int base = 0;                            // its place in the list of bases
    const BaseSettings* settings = nullptr;  // [group]
    const double* lr = nullptr;              // [group]
    const uint8_t* first = nullptr;          // [row], the state is new; may be null
    double* steps = nullptr;                 // [row], scratch: step counts after this step
    double inverse_grad_scale = 1.0;
    bool skip_update = false;
    bool preview = false;  // write weights alone, and only of rows with a copy, which stays: a look-ahead
};

struct KernelSet {
    const char* name;
    void (*gram)(Launch&);
    void (*perturb)(Launch&);  // coefficients are given
    void (*restore)(Launch&);
    void (*combine)(Launch&);  // coefficients are given
    void (*ascent)(Launch&);   // Gram + rule + perturb with snapshot
    void (*descent)(Launch&);  // [Gram + rule +] combine + restore + base update
};

const KernelSet& baseline_kernels();
const KernelSet* avx2_kernels();  // nullptr where the compiler or the processor has none

// The best set for this processor; SAM_KERNELS_CPU_ISA=baseline overrides.
const KernelSet& kernels();

}  // namespace samk
