// The base optimizers that the kernels know. Tables, launches and instantiations of all backends go by this list.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "bases/adam.h"
#include "bases/lion.h"
#include "bases/rmsprop.h"
#include "bases/sgd.h"

namespace samk {

template <class... Each>
struct BaseList {};

using Bases = BaseList<Sgd, Adam, Lion, RMSprop>;

// ---------------------------------------------------------------- one of them, by its place in the list

template <class First, class... Rest>
int base_number(const std::string& name, BaseList<First, Rest...>) {
    if (name == First::kName) return 0;
    if constexpr (sizeof...(Rest) > 0) return 1 + base_number(name, BaseList<Rest...>{});
    throw std::invalid_argument("the kernels know no base optimizer of this name");
}
inline int base_number(const std::string& name) { return base_number(name, Bases{}); }

// f(base), with an object of the base's struct.
template <class F, class First, class... Rest>
auto with_base(int number, F&& f, BaseList<First, Rest...>) {
    if constexpr (sizeof...(Rest) > 0)
        if (number != 0) return with_base(number - 1, f, BaseList<Rest...>{});
    return f(First{});
}
template <class F>
auto with_base(int number, F&& f) {
    return with_base(number, f, Bases{});
}

// f(std::integral_constant) with the variant that a group's settings need.
template <class Base, int variant = 0, class F>
void with_variant(int wanted, const F& f) {
    if constexpr (variant + 1 < Base::kVariants)
        if (wanted != variant) return with_variant<Base, variant + 1>(wanted, f);
    f(std::integral_constant<int, variant>{});
}

// ---------------------------------------------------------------- room for what each has of its own

template <template <class> class Of, class... Each>
constexpr size_t largest(BaseList<Each...>) {
    size_t result = 0;
    for (const size_t size : {sizeof(Of<Each>)...}) result = size > result ? size : result;
    return result;
}

// An Of<Base>; which base's, those know who read it.
template <template <class> class Of>
class OneOf {
public:
    template <class Base>
    SAMK_HOST_DEVICE Of<Base>& of() {
        return *reinterpret_cast<Of<Base>*>(bytes_);
    }
    template <class Base>
    SAMK_HOST_DEVICE const Of<Base>& of() const {
        return *reinterpret_cast<const Of<Base>*>(bytes_);
    }

private:
    alignas(8) unsigned char bytes_[largest<Of>(Bases{})];
};

template <class Base>
using SettingsOf = typename Base::Settings;

// One parameter group's, without lr.
using BaseSettings = OneOf<SettingsOf>;

}  // namespace samk
