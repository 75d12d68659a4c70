// Descents with Adam and AdamW.
#define SAMK_IS_ADAM true
#define SAMK_NAME(x) x##_adam
#include "descent.inl"
